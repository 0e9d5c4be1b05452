// A history, taken from a known user or built by hand, and what is recommended after it.
// Texts go into the page by textContent alone.

const NUM_OFFERED = 10;
const MAX_HISTORY = 1000; // what /recommend reads
const PAUSE_MS = 150; // in typing, before a search

const byId = (id) => document.getElementById(id);

let history = []; // {item, title}, oldest first
let user = null; // whose history it is, as long as nothing was changed
const numAsked = new Map(); // path -> how often, so that only the newest answer is shown

async function ask(path, body) {
  const asked = body && {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify(body),
  };
  const response = await fetch(path, asked);
  const answer = await response.json();
  if (!response.ok) throw new Error(answer.detail);
  return answer;
}

// The answer, or null if the same path was asked again meanwhile.
async function askNewest(name, path, body) {
  const number = (numAsked.get(name) ?? 0) + 1;
  numAsked.set(name, number);
  const answer = await ask(path, body);
  return numAsked.get(name) === number ? answer : null;
}

function say(text) {
  byId("status").textContent = text;
}

function made(tag, text, className) {
  const element = document.createElement(tag);
  if (text !== undefined) element.textContent = text;
  if (className) element.className = className;
  return element;
}

function row(one, { action, label, act, note, score }) {
  const line = made("li");
  const words = made("div");
  words.append(made("span", one.title));
  if (note) words.append(made("p", note, "note"));
  line.append(words);
  if (score !== undefined) line.append(made("span", score.toFixed(3), "score"));
  const button = made("button", action);
  button.type = "button";
  button.setAttribute("aria-label", `${label} ${one.title}`);
  button.addEventListener("click", act);
  line.append(button);
  return line;
}

function showHistory() {
  const rows = history.map((one, place) =>
    row(one, { action: "Remove", label: "Remove", act: () => change(history.toSpliced(place, 1)) }),
  );
  byId("history").replaceChildren(...rows.reverse());
  byId("clear").disabled = history.length === 0;
}

function reason(because) {
  if (!because.length) return undefined;
  const parts = because.map((one) => `${one.title} (${Math.round(100 * one.share)}\u00a0%)`);
  return `because of ${parts.join(", ")}`;
}

async function showOffered() {
  if (!history.length && user === null) {
    numAsked.set("recommend", (numAsked.get("recommend") ?? 0) + 1);
    byId("offered").replaceChildren();
    say("Choose a user, or add items.");
    return;
  }
  const asker = user === null ? { history: history.map((one) => one.item).slice(-MAX_HISTORY) } : { user };
  const answer = await askNewest("recommend", "recommend", { ...asker, k: NUM_OFFERED, explain: true });
  if (answer === null) return;
  const rows = answer.items.map((one) =>
    row(one, {
      action: "Add",
      label: "Add to the history:",
      act: () => change([...history, one]),
      note: reason(one.because),
      score: one.score,
    }),
  );
  byId("offered").replaceChildren(...rows);
  const whom = user === null ? `a history of ${history.length}` : `user ${user}`;
  say(answer.items.length ? `For ${whom}` : `Nothing is left to recommend for ${whom}`);
}

async function change(items, of = null) {
  history = items;
  user = of;
  showHistory();
  await told(showOffered);
}

async function showFound() {
  const query = byId("search").value.trim();
  const answer = query
    ? await askNewest("items", `items?query=${encodeURIComponent(query)}`)
    : { items: [] };
  if (answer === null || query !== byId("search").value.trim()) return;
  const rows = answer.items.map((one) =>
    row(one, { action: "Add", label: "Add to the history:", act: () => change([...history, one]) }),
  );
  byId("found").replaceChildren(...rows);
}

async function showUsers() {
  const answer = await askNewest("users", `users?query=${encodeURIComponent(byId("user").value)}`);
  if (answer === null) return;
  byId("users").replaceChildren(
    ...answer.users.map((id) => {
      const option = made("option");
      option.value = String(id);
      return option;
    }),
  );
}

async function showUser() {
  const id = byId("user").value.trim();
  if (!id) return;
  const answer = await askNewest("history", `history?user=${encodeURIComponent(id)}`);
  if (answer !== null) await change(answer.items, answer.user);
}

async function told(act) {
  try {
    await act();
  } catch (error) {
    say(error.message);
  }
}

let pause;
function afterPause(act) {
  clearTimeout(pause);
  pause = setTimeout(() => told(act), PAUSE_MS);
}

byId("user-form").addEventListener("submit", (event) => {
  event.preventDefault();
  told(showUser);
});
byId("search-form").addEventListener("submit", (event) => {
  event.preventDefault();
  told(showFound);
});
byId("search").addEventListener("input", () => afterPause(showFound));
byId("user").addEventListener("input", () => afterPause(showUsers));
byId("clear").addEventListener("click", () => change([]));

await told(async () => {
  const health = await ask("health");
  byId("about").textContent =
    `${health.num_items.toLocaleString("en")} items, ` +
    `${health.num_users.toLocaleString("en")} known users; export ${health.export}`;
  await showUsers();
});
await change([]);

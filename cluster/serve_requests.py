"""What may be asked over HTTP, and what is answered: the bodies of the routes of `serve_api`.

A body is a JSON object without unknown keys, and nothing is converted: "3" is no number. Where it
names a user or an item, that is an external id, a string or an integer.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, JsonValue, model_validator

MAX_K = 1000
MAX_HISTORY = 1000
MAX_ITEMS = 1000  # asked about at once
MAX_ROWS = 256  # of vectors in one answer
MAX_FILTER_IDS = 10_000
MAX_ID_CHARACTERS = 256


def _check_id(value: object) -> object:
    if isinstance(value, bool) or not isinstance(value, (str, int)):
        raise ValueError("an id is a string or an integer")
    if isinstance(value, int):
        if not -(2**63) <= value < 2**63:
            raise ValueError("an integer id has 64 bits at most")
        return value
    if len(value) > MAX_ID_CHARACTERS:
        raise ValueError(f"an id has {MAX_ID_CHARACTERS} characters at most")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ValueError("an id is text, and half a surrogate pair is none") from None
    return value


Id = Annotated[str | int, BeforeValidator(_check_id)]
History = Annotated[list[Id], Field(max_length=MAX_HISTORY, description="Oldest item first.")]
Items = Annotated[list[Id], Field(min_length=1, max_length=MAX_ITEMS)]
FilterIds = Annotated[list[Id], Field(max_length=MAX_FILTER_IDS)]
K = Annotated[int, Field(ge=1, le=MAX_K)]


class _Asked(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class _AskedForSomebody(_Asked):
    user: Id | None = None
    history: History | None = None

    @model_validator(mode="after")
    def _one_of_both(self) -> _AskedForSomebody:
        if (self.user is None) == (self.history is None):
            raise ValueError("give either user or history")
        return self


class FilterRequest(_Asked):
    """Which items may be offered; every condition must hold."""

    where: dict[str, FilterIds] = Field(
        {}, max_length=16, description="Item feature -> values, of which an item has one."
    )
    only: FilterIds | None = Field(None, description="What is available; null: all items.")
    without: FilterIds = []


class RecommendRequest(_AskedForSomebody):
    k: K = 10
    exclude_seen: bool = True
    filter: FilterRequest | None = None
    diversity: float = Field(0.0, ge=0, le=1)
    explain: bool = False


class SimilarRequest(_Asked):
    item: Id
    k: K = 10
    filter: FilterRequest | None = None


class ScoreRequest(_AskedForSomebody):
    items: Items
    task: Literal["ctr", "ranking"] | None = None


class RateRequest(_AskedForSomebody):
    items: Items


class EmbedRequest(_Asked):
    """Exactly one of them."""

    users: Annotated[list[Id], Field(min_length=1, max_length=MAX_ROWS)] | None = None
    histories: Annotated[list[History], Field(min_length=1, max_length=MAX_ROWS)] | None = None
    items: Annotated[list[Id], Field(min_length=1, max_length=MAX_ROWS)] | None = None

    @model_validator(mode="after")
    def _one_of_three(self) -> EmbedRequest:
        if sum(rows is not None for rows in (self.users, self.histories, self.items)) != 1:
            raise ValueError("give exactly one of users, histories and items")
        return self


class Item(BaseModel):
    """`title`: its text feature, or its id where the data has none."""

    item: str | int
    title: str


class Reason(BaseModel):
    item: str | int
    title: str
    share: float


class OfferedItem(Item):
    """`features`: its columns in the prepared data; `because`: where asked for, the items of the
    history that are most like it."""

    score: float
    features: dict[str, JsonValue]
    because: list[Reason]


class Offered(BaseModel):
    items: list[OfferedItem]


class ScoredItem(BaseModel):
    item: str | int
    score: float


class Scored(BaseModel):
    """`task`: what the scores are: probabilities of a click (ctr), or ranking scores."""

    task: str
    scores: list[ScoredItem]


class RatedItem(BaseModel):
    item: str | int
    rating: float


class Rated(BaseModel):
    ratings: list[RatedItem]


class Embedded(BaseModel):
    dim: int
    vectors: list[list[float]]


class Taken(BaseModel):
    """What a user took, oldest first."""

    user: str | int
    items: list[Item]


class Found(BaseModel):
    items: list[Item]


class Users(BaseModel):
    users: list[str | int]


class Health(BaseModel):
    """`export` names the content that is served; `refused`: why a newer one is not."""

    status: Literal["ok"]
    export: str
    num_users: int
    num_items: int
    refused: str | None


class Refusal(BaseModel):
    """Of every answer with a status of 4xx: one line that names the field."""

    detail: str

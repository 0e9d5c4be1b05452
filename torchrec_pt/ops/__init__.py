"""The Python face of the compiled operators in csrc: wrapper, fake, autograd, float64 reference."""

import torch  # noqa: F401 - loads the libraries that _C is linked to

from torchrec_pt.extension import load_operators

try:
    _C = load_operators()
except ImportError as error:
    raise ImportError(
        f"torchrec_pt: the operators of csrc cannot be loaded ({error}); run `make setup`"
    ) from error

from torchrec_pt.ops.dropout import dropout
from torchrec_pt.ops.infonce import infonce_logsumexp, infonce_loss
from torchrec_pt.ops.negatives import NegativeSampler, SampledNegatives
from torchrec_pt.ops.sampled_softmax import sampled_softmax_loss

build_info = _C.build_info

__all__ = [
    "NegativeSampler",
    "SampledNegatives",
    "build_info",
    "dropout",
    "infonce_logsumexp",
    "infonce_loss",
    "sampled_softmax_loss",
]

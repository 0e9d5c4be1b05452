"""python -m torchrec_pt, as torchrun starts it: torchrun … -m torchrec_pt run CONFIG.toml"""

from torchrec_pt.cli import main

main()

"""Train a Transformer on a token file: resumable, evaluated in bits per byte, with checkpoints, curves and a report.

    python -m experiments.pretrain --run runs/tiny --train data/train.bin --heldout data/heldout.bin \
        --tokenizer data/tokenizer.json --model.d-model 256 --model.n-layers 4 --steps 2000
    python -m experiments.pretrain ... --resume        # goes on from the newest checkpoint, bit for bit

Everything the run needs is in `Pretrain`; every hyper-parameter is a flag. The batch of step i is a pure function of
(token file, seed, i), so the position in the data is the step.
"""

import tyro

from experiments.config import Pretrain
from experiments.console import program
from experiments.generate import complete
from experiments.loop import finish, start, summarise, train
from purelm.tokenizer import load as load_tokenizer


@program
def main(cfg: Pretrain) -> None:
    ready = start(cfg)
    result = train(cfg, ready)
    samples = []
    if cfg.sample and cfg.tokenizer is not None:
        bpe = load_tokenizer(cfg.tokenizer)
        samples = [(p, complete(result.state.params, ready.model, bpe, p, seed=cfg.seed)) for p in cfg.sample]
    finish(cfg, ready.model, summarise(cfg, ready.model, result), title=f"purelm run {cfg.run.name}", samples=samples)


if __name__ == "__main__":
    main(tyro.cli(Pretrain))

"""What the tests of the training service share: a configuration, a store with keys, a server in a thread."""

import threading
import time
from contextlib import contextmanager

import uvicorn

from experiments.scaling.service import keys
from experiments.scaling.service.app import create_app
from experiments.scaling.service.running import bind
from experiments.scaling.service.schemas import Rules, TrainingConfig
from experiments.scaling.service.store import create

TEXT = {"ada": "12345678", "ben": "87654321"}
ARCHITECTURE = dict(
    attention_bias=False, head_dim=16, hidden_size=32, intermediate_size=64, num_attention_heads=2,
    num_hidden_layers=2, num_key_value_heads=2, rms_norm_eps=1e-6, rope_theta=10_000, tie_word_embeddings=False,
    dtype="float32", vocab_size=100,
)  # fmt: skip


def config(architecture=None, **changes):
    """A configuration as JSON: 8 updates, 4 evaluations, 20 seconds."""
    return dict(
        architecture_config={**ARCHITECTURE, **(architecture or {})}, optimizer_config={"weight_decay": 0.1},
        train_batch_size=8, val_batch_size=8, n_evals=4, total_train_tokens=8 * 512 * 8, max_runtime_seconds=20.0,
        model_seed=0,
    ) | changes  # fmt: skip


def parsed(**changes):
    return TrainingConfig.model_validate(config(**changes))


def make_store(folder, budget=100.0, names=("ada", "ben")):
    """A store with a key for each name; the keys."""
    store = create(folder, {"backend": "surrogate"})
    salt = store.meta()["salt"]
    with store.write() as db:
        made = [keys.add_key(db, name, keys.hashed(TEXT[name], salt), budget, 7, 0.0) for name in names]
    return store, made


@contextmanager
def served(store, **options):
    """The URL of a server in a thread of this process, without workers."""
    sock = bind("127.0.0.1", 0)
    app = create_app(store, Rules(), "surrogate", **options)
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", proxy_headers=False))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]})
    thread.start()
    try:
        yield f"http://127.0.0.1:{sock.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()
        sock.close()


def until(condition, seconds=600.0):
    """Wait for something that other processes bring about; the limit is only for a test that fails."""
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, "it did not come about"
        time.sleep(0.02)
    return found

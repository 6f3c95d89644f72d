"""Under torchrun: one of the scripts, with each layer of a tiny model sharded on its own, as the
layers of a real one are."""
import importlib
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import train_sft  # noqa: E402

if __name__ == "__main__":
    train_sft.SMALL_UNIT = 0
    sys.argv = sys.argv[1:]
    importlib.import_module(Path(sys.argv[0]).stem).main(sys.argv[1:])

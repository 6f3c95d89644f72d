"""
The scripts on a pretended accelerator: tensors are computed by the CPU, but say that they are on
"sim:0" and that they are CUDA's, and an operation on tensors of two devices raises as it does on
CUDA. Finds such mistakes without a GPU, and counts the synchronisations.

    python tests/pretended.py "train_sft.py @runs/toy.args" "evaluate.py ckpt/toy"

Each argument is one command. FlashAttention's kernel is replaced by a slow one that checks its
arguments; the model is not sharded (sharding is tested on the CPU).
"""
import importlib
import shlex
import sys
from collections import Counter
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import (
    _DummyBackendModule,
    _setup_privateuseone_for_python_backend,
)

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "runs")]

# these take tensors of two devices on CUDA, too
MAY_MIX = {"aten._to_copy", "aten.copy_", "aten.index", "aten.index_put_", "aten.lift_fresh",
           "aten._index_put_impl_", "aten.index_put", "aten._unsafe_index", "aten.set_"}
SYNCS: Counter = Counter()  # copies from the device to the host, by function


class Backend(_DummyBackendModule):
    def get_amp_supported_dtype(self):
        return [torch.bfloat16, torch.float16]

    def is_available(self):
        return False  # states are saved without streams, which it does not have

    def synchronize(self, *args):
        pass


class Pretended(torch.Tensor):
    is_cuda = True

    @staticmethod
    def __new__(cls, on_cpu: torch.Tensor):
        out = torch.Tensor._make_wrapper_subclass(
            cls, on_cpu.size(), strides=on_cpu.stride(), storage_offset=on_cpu.storage_offset(),
            dtype=on_cpu.dtype, layout=on_cpu.layout, device=torch.device("sim:0"))
        out.on_cpu = on_cpu
        return out

    def __repr__(self, **_):
        return f"Pretended({tuple(self.shape)}, {self.dtype})"

    def tolist(self):
        return self.cpu().tolist()

    def __getitem__(self, key):  # a list as an index becomes a tensor of this device inside torch
        if isinstance(key, tuple):
            key = tuple(torch.tensor(k).to("sim") if isinstance(k, list) else k for k in key)
        return super().__getitem__(key)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return pretend(func, args, kwargs or {})


def place() -> str:
    """The function of ours, or of the model, that is running."""
    frame = sys._getframe()
    while frame:
        path = Path(frame.f_code.co_filename)
        if path.parent == ROOT or path.stem.startswith(("modeling_", "vision_utils")):
            return f"{path.stem}.{frame.f_code.co_name}"
        frame = frame.f_back
    return "?"


def pretend(func, args, kwargs):
    """Compute an operation on the CPU; -> tensors on the device where CUDA would have put them."""
    name = str(func).rsplit(".", 1)[0]
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
    on_device = [x for x in tensors if isinstance(x, Pretended)]
    on_host = [x for x in tensors if not isinstance(x, Pretended) and x.dim() > 0]
    first_on_device = bool(args) and isinstance(args[0], Pretended)
    mixed = on_device and on_host and name not in MAY_MIX
    if name.startswith("aten.index") and not first_on_device:
        mixed = any(isinstance(x, Pretended) for x in tree_leaves(args[1]))
    if mixed:
        raise RuntimeError(f"Expected all tensors to be on the same device: {func} got "
                           f"{[tuple(x.shape) for x in on_device]} on sim:0 and "
                           f"{[tuple(x.shape) for x in on_host]} on the CPU, in {place()}")

    to_device = bool(on_device)
    if kwargs.get("device") is not None:
        to_device = torch.device(kwargs["device"]).type == "sim"
        kwargs = {**kwargs, "device": "cpu"}
    elif name in ("aten.copy_", "aten.set_", "aten.index"):
        to_device = first_on_device
    if on_device and not to_device or name == "aten._local_scalar_dense":
        SYNCS[place()] += 1
    kwargs = {key: value for key, value in kwargs.items() if key != "pin_memory"}
    real_args, real_kwargs = tree_map(lambda x: x.on_cpu if isinstance(x, Pretended) else x,
                                      (args, kwargs))
    out = func(*real_args, **real_kwargs)
    if not to_device:
        return out
    out = tree_map(lambda x: Pretended(x) if isinstance(x, torch.Tensor) else x, out)
    return return_and_correct_aliasing(func, args, kwargs, out) if on_device else out


def on_sim(kwargs) -> bool:
    device = (kwargs or {}).get("device")
    return device is not None and torch.device(device).type == "sim"


class Factories(TorchDispatchMode):
    """Operations that make a tensor with device="sim"."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return pretend(func, args, kwargs) if on_sim(kwargs) else func(*args, **(kwargs or {}))


class Tensors(TorchFunctionMode):
    """torch.tensor(..., device="sim"), which is no operation."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func is torch.tensor and on_sim(kwargs):
            device = kwargs.pop("device")
            return func(*args, **kwargs).to(device)
        return func(*args, **kwargs)


def to_device(model):
    """Parameters and buffers; a tied parameter stays one."""
    moved = {}
    for module in model.modules():
        for key, parameter in module._parameters.items():
            if parameter is None:
                continue
            if parameter not in moved:
                moved[parameter] = torch.nn.Parameter(Pretended(parameter.detach()))
            module._parameters[key] = moved[parameter]
        for key, buffer in module._buffers.items():
            module._buffers[key] = Pretended(buffer)
    model.compute_device = torch.device("sim:0")
    return model


def slow_varlen(q, k, v, starts, starts_k, longest, longest_k, *, scale, window_size=(-1, -1)):
    """torch.nn.attention.varlen.varlen_attn, with what its kernel demands."""
    lengths = getattr(starts, "on_cpu", starts).diff()
    assert starts is starts_k and starts.dtype == torch.int32
    assert type(longest) is int and longest == longest_k >= int(lengths.max())
    assert q.dtype == torch.bfloat16 and q.shape[-1] % 8 == 0 and q.shape == k.shape == v.shape
    assert window_size in ((-1, -1), (-1, 0))
    outs = [F.scaled_dot_product_attention(*(x.transpose(0, 1)[None] for x in parts), scale=scale,
                                           is_causal=window_size == (-1, 0))[0].transpose(0, 1)
            for parts in zip(*(x.split(lengths.tolist()) for x in (q, k, v)))]
    return torch.cat(outs)


def use_device() -> None:
    """Make our scripts pick the pretended device."""
    import evaluate
    import train_sft
    _setup_privateuseone_for_python_backend("sim", backend_module=Backend())
    sim, load, reduce = torch.device("sim:0"), evaluate.load_model, dist.all_reduce

    def setup_distributed(device="auto", **options):
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        return 0, 1, sim

    def load_model(checkpoint, device, dtype):
        return to_device(load(checkpoint, torch.device("cpu"), dtype))

    def shard_model(folder, device, dtype, *options, master=torch.float32, **trained):
        import render
        model = load_model(render.open_checkpoint(str(folder), quiet=True), device, dtype)
        for name in ("requires_gradient_sync", "reshard_after_backward", "is_last_backward"):
            setattr(model, f"set_{name}", lambda value: None)
        return model

    def all_reduce(x, *args, **kwargs):  # of one process
        return None if isinstance(x, Pretended) else reduce(x, *args, **kwargs)

    dist.all_reduce = all_reduce
    evaluate.pick_device = lambda device="auto": sim
    evaluate.setup_distributed, evaluate.load_model = setup_distributed, load_model
    evaluate.varlen_attn, evaluate.VARLEN_FLAGS = slow_varlen, {"scale", "window_size"}
    train_sft.shard_model = shard_model


def main() -> None:
    use_device()
    with Factories(), Tensors():
        for command in sys.argv[1:]:
            script, *argv = shlex.split(command)
            importlib.import_module(script.removesuffix(".py")).main(argv)
    for function, count in SYNCS.most_common():
        print(f"synchronised {count} times: {function}")


if __name__ == "__main__":
    main()

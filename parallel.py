"""Training in more than one process: `torchrun --nproc-per-node 8 train.py ...`.

Every process runs the same script. What a step holds depends on seed and step alone, so each of them knows it whole,
takes its share (`shares`), and what is counted is added up (`total`). Of the model, each holds a slice of every
parameter, with its gradient and moments; for as long as a block computes, its parameters are put together (PyTorch's
FSDP2). Rank 0 speaks and writes: the others are told what it found (`first`). In one process without torchrun, all of
this does nothing. ppo.py, which writes texts between its steps, holds all of the model in each process: what it makes
of many items is made in shares (`by_shares`), and gradients are added up as they are (`add_up`).

A state to resume from is one file, state.pt, of a single process; of several, it names a folder beside it, to which
each has written its slices (torch.distributed.checkpoint). Any number of processes can go on with either.
"""
import contextlib
import datetime
import heapq
import os
import re
import shutil
import sys
import time
import warnings

import torch
import torch.distributed as dist

from common import UserError
from resume import Run

PATIENCE = datetime.timedelta(hours=12)  # rank 0 may score or write for long; of dead processes torchrun knows at once


@contextlib.contextmanager
def processes(device):
    """Within it, the processes that torchrun has started are joined; yields the device of this one, of --device's kind.
    What rank 0 prints is seen, and of the others only an error that does not end rank 0 as well."""
    if not dist.is_torchelastic_launched():
        yield device
        return
    gpu = torch.cuda.is_available() if device is None else device.startswith("cuda")
    place = f"cuda:{os.environ['LOCAL_RANK']}" if gpu else device or "cpu"
    if gpu:
        torch.cuda.set_device(place)
    try:
        dist.init_process_group("cpu:gloo,cuda:nccl" if gpu else "gloo", timeout=PATIENCE,
                                device_id=torch.device(place) if gpu else None)
        silent = open(os.devnull, "w") if rank() else sys.stdout
        with contextlib.redirect_stdout(silent), contextlib.redirect_stderr(silent if rank() else sys.stderr):
            yield place
        dist.destroy_process_group()
        time.sleep(0.5)  # gloo's threads let go of tensors; where Python ends before, that aborts (PyTorch #179291)
    except BaseException as error:
        left = isinstance(error, RuntimeError) and re.search("gloo|NCCL|onnection (closed|reset)", str(error))
        if int(os.environ["RANK"]) > (1 if left else 0):  # the first two speak of another's end: it may be the other
            time.sleep(3)  # torchrun ends this process meanwhile, and nothing is told twice
        if left:
            raise UserError("another process of this run has ended; start it again with --resume") from error
        raise


def several():
    """Whether this is one of torchrun's processes."""
    return dist.is_initialized()


def rank():
    return dist.get_rank() if several() else 0


def count():
    return dist.get_world_size() if several() else 1


def about():
    """What a run tells of its processes, where they are several."""
    return {"processes": count()} if several() else {}


def check(names):
    """UserError, in several processes, for methods `names`, whose losses compare the examples of a pass."""
    if several() and names:
        raise UserError(f"{', '.join(names)}: compares all examples of a pass, which several processes have in parts; "
                        "start it without torchrun")


def first(make, *given):
    """What make(*given) gives on rank 0, in every process."""
    if not several():
        return make(*given)
    told = [make(*given) if rank() == 0 else None]
    dist.broadcast_object_list(told)
    return told[0]


def total(number):
    """The sum of all processes' numbers."""
    if not several():
        return number
    number = torch.tensor(number, dtype=torch.float64)
    dist.all_reduce(number)
    return number.item()


def all_of(value):
    """[each process's value]."""
    values = [value] * count()
    if several():
        dist.all_gather_object(values, value)
    return values


def shares(items, size):
    """Each process's part of items, by size as equal as can be had without search: the largest first, each to whom has
    least so far."""
    if not several():
        return [items]
    parts = [[] for _ in range(count())]
    least = [(0, place) for place in range(len(parts))]
    for item in sorted(items, key=size, reverse=True):
        load, place = heapq.heappop(least)
        parts[place].append(item)
        heapq.heappush(least, (load + size(item), place))
    return parts


def by_shares(make, items):
    """What make(items) gives, a value for each of a list's items, in their order. Each process makes the values of its
    share: of items in the order of their sizes, shares are of a size. A value is none on a GPU: it would come to the
    same GPU in every process."""
    if not several():
        return make(items)
    mine, values = every(items), [None] * len(items)
    for place, made in enumerate(all_of(make(mine) if len(mine) else [])):
        values[place::count()] = made
    return values


def every(items):
    """This process's share of a list's items: of N processes, every N-th."""
    return items[rank()::count()]


def add_up(tensors):
    """Make each tensor the sum of all processes' tensors, in place."""
    if several():
        for tensor in tensors:
            dist.all_reduce(tensor)


def add_up_gradients(parameters):
    """As `add_up`, of parameters that each process holds whole; one that had no part in the loss has none yet."""
    if several():
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        add_up([parameter.grad for parameter in parameters])


# ----------------------------------------------------------------------------------------------------------------
# The model in slices


def place_to_load(device):
    """Where a process that computes on a device loads a model to. Of several, rank 0 alone holds it, in main memory;
    the others know its shapes, and `shard` gives each its slice."""
    return device if not several() else "meta" if rank() else "cpu"


def device_of(llama):
    """Where a Llama that has been loaded so is to compute."""
    return (dist.group.WORLD.bound_device_id or torch.device("cpu")) if several() else llama.device


def shard(llama, half, replicate):
    """Leave each process its slice of rank 0's Llama, on its device; with replicate, all of it, so that gradients alone
    are exchanged. Parameters are handed out one after another. half: blocks compute in bf16; the embedding and the head
    are cast as in one process, by autocast."""
    if not several():
        return
    from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
    from torch.distributed.tensor import distribute_tensor
    shape = (count(), 1) if replicate else (count(),)
    names = ("replicate", "shard") if replicate else ("shard",)
    mesh = dist.init_device_mesh(device_of(llama).type, shape, mesh_dim_names=names)
    policy = MixedPrecisionPolicy(torch.bfloat16 if half else None, torch.float32, cast_forward_inputs=False)
    weights, device = {name: weight.detach() for name, weight in llama.named_parameters()}, device_of(llama)
    llama.to("meta").tie()
    for block in llama.model.layers:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(llama, mesh=mesh)
    for name, like in list(llama.named_parameters()):
        weight = weights.pop(name)
        weight = weight.to(device) if rank() == 0 else torch.empty_like(weight, device=device)
        put(llama, name, distribute_tensor(weight, like.device_mesh, like.placements), like.requires_grad)
    llama.tie()
    for module in llama.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)  # the loss is divided by the targets of all processes already
            module.set_force_sum_reduction_for_comms(True)


def put(llama, name, tensor, requires_grad=True):
    """Make a tensor the parameter of that name."""
    module, _, leaf = name.rpartition(".")
    setattr(llama.get_submodule(module), leaf, torch.nn.Parameter(tensor, requires_grad))


def trained(llama):
    """What is trained, by name: all parameters, but for LoRA."""
    if hasattr(llama, "reshard"):  # it is in slices
        llama.reshard()  # after a pass without a backward one, the root's parameters are still whole
    return {name: parameter for name, parameter in llama.named_parameters() if parameter.requires_grad}


def sliced(tensor, like):
    """The slice of a whole tensor that this process has of a parameter `like` it; where it has all of it, the tensor.
    """
    if not hasattr(like, "device_mesh"):
        return tensor
    from torch.distributed.tensor import distribute_tensor
    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def whole(tensor):
    """The tensor whose slices the processes have."""
    return tensor.full_tensor() if several() else tensor


def gather(llama):
    """Put the trained parameters together, one after another, on rank 0, in main memory. The model can be saved then,
    and nothing else."""
    if not several():
        return
    for name, parameter in trained(llama).items():
        found = whole(parameter.detach())
        put(llama, name, found.cpu() if rank() == 0 else torch.empty(0))
    llama.tie()


# ----------------------------------------------------------------------------------------------------------------
# The run, and its states


class Follower(Run):
    """What rank 0's Run is in the other processes: it reads, and writes nothing."""

    def __init__(self, out, settings, state):
        self.out, self.settings, self.path, self.finished = out, settings, out / "state.pt", False
        self.state = self.read() if state else None

    def write(self, row):
        pass

    def save(self, **parts):
        pass


def led(begin):
    """The Run that begin() gives on rank 0, and its Followers elsewhere."""
    run = begin() if rank() == 0 else None
    finished, *rest = first(lambda: (run.finished, run.out, run.settings, run.state is not None))
    run = run or Follower(*rest)
    run.finished = finished
    return run


def save(run, llama, optimizer=None, **place):
    """Keep a state that `restore` goes on from: weights, moments, and the place in the run: stage, step, ..."""
    if not several():
        moments = {"optimizer": optimizer.state_dict()} if optimizer else {}
        run.save(model=trained(llama), **moments, **place)
        return
    from torch.distributed.checkpoint import save
    folder = run.out / f"state.pt.{place['stage']}.{place['step']}"
    save(slices(llama, optimizer), checkpoint_id=folder)
    run.save(folder=folder.name, **place)  # from here on, it is the state
    if rank() == 0:
        for other in run.out.glob("state.pt.*"):
            if other.is_dir() and other != folder:
                shutil.rmtree(other)


def restore(run, llama, optimizer=None):
    """Put the weights of a run's state into llama; or, given an optimizer of these, the moments into that."""
    state, key = run.state, "optimizer" if optimizer else "model"
    with run.loading():
        if "folder" in state:
            load_slices(run.out / state["folder"], llama, optimizer)
        elif optimizer:
            moments, parameters = state.pop(key), [p for group in optimizer.param_groups for p in group["params"]]
            for place, values in moments["state"].items():
                like = parameters[place]
                values.update({name: sliced(value, like) for name, value in values.items()
                               if torch.is_tensor(value) and value.shape == like.shape})
            optimizer.load_state_dict(moments)
        else:
            weights, there = state.pop(key), trained(llama)
            llama.load_state_dict({name: sliced(weights[name], there[name]) for name in there}, strict=False)


def slices(llama, optimizer):
    """{"model", "optimizer"}: this process's slices by the parameters' names, as torch.distributed.checkpoint has them,
    of what is trained."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, get_optimizer_state_dict
    options = StateDictOptions(ignore_frozen_params=True, strict=False)
    trained(llama)
    parts = {"model": get_model_state_dict(llama, options=options)}
    if optimizer:
        parts["optimizer"] = get_optimizer_state_dict(llama, optimizer, options=options)
    return parts


def load_slices(folder, llama, optimizer):
    from torch.distributed.checkpoint import CheckpointException, load
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict, set_optimizer_state_dict
    options, parts = StateDictOptions(ignore_frozen_params=True, strict=False), slices(llama, optimizer)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # in one process, it tells that it is one
            load(parts, checkpoint_id=folder, no_dist=not several())
    except (CheckpointException, OSError) as error:  # the first is no Exception
        raise RuntimeError(str(error)) from error
    set_model_state_dict(llama, parts["model"], options=options)
    if optimizer:
        set_optimizer_state_dict(llama, optimizer, parts["optimizer"], options=options)

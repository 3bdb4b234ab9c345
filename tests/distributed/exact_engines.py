"""The bare optimizer on each engine, without a Trainer: how a model is sharded, and how it steps."""

import gc

import torch
import torch.distributed as dist
from exact_cases import make_model, make_optimizer


class Replicated:
    """One device, or data parallelism as DistributedDataParallel does it."""

    merged = False

    def __init__(self, case):
        self.model = self.shard(make_model(case))
        self.optimizer = make_optimizer(case, self.model, self.merged)

    def shard(self, model):
        return model

    def backward(self, grads, is_bad):
        self.optimizer.zero_grad()
        self.model(grads).backward()
        for p in self.model.parameters():
            if p.grad is not None and world() > 1:
                dist.all_reduce(p.grad)
                p.grad /= world()
        if is_bad:
            next(self.model.parameters()).grad.view(-1)[-1] = torch.nan

    def step(self, loss):
        self.optimizer.step(loss=loss)

    def parameters(self):
        """The whole parameters."""
        return {name: p.detach().clone() for name, p in self.model.named_parameters()}

    def parts(self):
        """This rank's shards of them."""
        return [local(p.detach()).clone() for p in self.model.parameters()]

    def close(self):
        pass


class Fsdp2(Replicated):
    def mesh(self):
        from torch.distributed.device_mesh import init_device_mesh

        return init_device_mesh("cpu", (world(),))

    def shard(self, model):
        from torch.distributed.fsdp import fully_shard

        return fully_shard(model, mesh=self.mesh())

    def backward(self, grads, is_bad):
        self.optimizer.zero_grad()
        self.model(_poisoned(grads, is_bad)).backward()

    def parameters(self):
        return {name: p.detach().full_tensor().clone() for name, p in self.model.named_parameters()}


class Hsdp(Fsdp2):
    def mesh(self):
        from torch.distributed.device_mesh import init_device_mesh

        return init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))


class Zero(Replicated):
    stage = 1
    merged = True

    def __init__(self, case, **zero):
        import deepspeed

        gc.freeze()  # DeepSpeed collects garbage for every engine, which would scan all modules
        model = make_model(case)
        config = {
            "train_micro_batch_size_per_gpu": 1,
            "zero_allow_untested_optimizer": True,
            "gradient_clipping": 0.0,  # 1.0 by default
            "zero_optimization": {"stage": self.stage, "stage3_param_persistence_threshold": 0, **zero},
        }
        self.optimizer = make_optimizer(case, model, self.merged)
        self.engine = deepspeed.initialize(model=model, optimizer=self.optimizer, config=config)[0]
        self.model = self.engine.module

    def backward(self, grads, is_bad):
        self.engine.backward(self.engine(_poisoned(grads, is_bad)))

    def step(self, loss):
        self.optimizer.observe_loss(loss, begin=True)
        self.engine.step()

    def close(self):
        """Without this, DeepSpeed keeps every engine, and each new one is slower."""
        self.engine.destroy()


class Zero2(Zero):
    stage = 2


class Zero3(Zero):
    stage = 3

    def backward(self, grads, is_bad):
        """ZeRO-3 would give an unused parameter its gradient of the step before, so it gets zeros."""
        names = [name for name, p in self.model.named_parameters() if p.requires_grad]
        zeros = {name: torch.zeros(p.ds_shape) for name, p in self.model.named_parameters()}
        super().backward({name: grads.get(name, zeros[name]) for name in names}, is_bad)

    def parameters(self):
        import deepspeed

        with deepspeed.zero.GatheredParameters(list(self.model.parameters())):
            return super().parameters()

    def parts(self):
        """Without the padding of the last partition, which DeepSpeed never fills: it may be NaN."""
        params = list(self.model.parameters())
        held = [p.ds_numel - rank() * p.partition_numel() for p in params]
        return [p.ds_tensor[: max(n, 0)].clone() for p, n in zip(params, held, strict=True)]


ENGINES = {
    "replicated": Replicated,
    "fsdp2": Fsdp2,
    "hsdp": Hsdp,
    "zero1": Zero,
    "zero2": Zero2,
    "zero3": Zero3,
}


def world():
    return dist.get_world_size() if dist.is_initialized() else 1


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def _poisoned(grads, is_bad):
    """With a NaN as the last entry of the first gradient."""
    name, grad = next(iter(grads.items()))
    last = torch.arange(grad.numel()).view(grad.shape) == grad.numel() - 1
    return {**grads, name: grad.masked_fill(last, torch.nan)} if is_bad else grads


def local(x):
    return x.to_local() if hasattr(x, "to_local") else x

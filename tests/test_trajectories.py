"""The optimizer reproduces float64 trajectories that were computed with exact polar factors."""

import json
from pathlib import Path

import pytest
import torch

from hf_noneuclid import NonEuclideanDescent

REFERENCE = json.loads((Path(__file__).parent / "data" / "trajectories.json").read_text())
PROBLEM = REFERENCE["problem"]
OPTIONS = ("lr", "descent", "product_norm", "momo", "momentum", "beta2", "eps", "weight_decay")
OPTIONS += ("spectral_scale", "nuclear_norm")


def tensors(values):
    return {name: torch.tensor(value, dtype=torch.float64) for name, value in values.items()}


def case_name(case):
    words = [case["descent"], case["product_norm"], case["vector_norm"], case["nuclear_norm"]]
    scale = f"s={case['spectral_scale']:g}"
    return "-".join([*words, scale, "momo" if case["momo"] else "plain"])


def make_optimizer(case, params):
    matrices = [(name, p) for name, p in params.items() if name in PROBLEM["matrices"]]
    vectors = [(name, p) for name, p in params.items() if name not in PROBLEM["matrices"]]
    groups = [
        {"params": matrices, "norm": "spectral"},
        {"params": vectors, "norm": case["vector_norm"]},
    ]
    options = {name: case[name] for name in OPTIONS}
    if case["momo"]:
        options["loss_lower_bound"] = case["loss_lower_bound"]
    return NonEuclideanDescent(groups, polar_method="svd", **options)


def loss_and_gradients(params, targets, noise):
    curvature = PROBLEM["curvature"]
    loss = PROBLEM["offset"]
    for name, p in params.items():
        difference = p.detach() - targets[name]
        loss += 0.5 * curvature * difference.square().sum().item()
        p.grad = curvature * difference + noise[name]
    return loss


def test_the_reference_holds_every_combination():
    keys = ("descent", "product_norm", "vector_norm", "momo")
    assert len({tuple(case[key] for key in keys) for case in REFERENCE["cases"]}) == 36
    assert {case["nuclear_norm"] for case in REFERENCE["cases"]} == {"exact", "stale", "frobenius"}


@pytest.mark.parametrize("case", REFERENCE["cases"], ids=case_name)
def test_trajectory(case):
    params = {name: p.requires_grad_() for name, p in tensors(PROBLEM["init"]).items()}
    targets = tensors(PROBLEM["target"])
    optimizer = make_optimizer(case, params)
    losses, step_sizes = [], []
    for factor, noise in zip(PROBLEM["lr_schedule"], PROBLEM["noise"], strict=True):
        for group in optimizer.param_groups:
            group["lr"] = case["lr"] * factor
        losses.append(loss_and_gradients(params, targets, tensors(noise)))
        optimizer.step(loss=losses[-1])
        step_sizes.append(optimizer.diagnostics()["step_size"])
    assert losses == pytest.approx(case["losses"], rel=1e-10)
    assert step_sizes == pytest.approx(case["step_sizes"], rel=1e-10)
    for name, final in tensors(case["final"]).items():
        torch.testing.assert_close(params[name].detach(), final, rtol=1e-10, atol=1e-10)

"""Both losses by others, each as loss(x, w, target): measured where they can be imported, never required.

Linear cross entropy, the mean over targets that are not -100: plain, torch.compile, torch's own chunked (three of its
options), Liger-Kernel, cut-cross-entropy (CCE), QuACK. Contrastive, x the queries and w the candidates, of unit length,
row n the positive of query n: plain, torch.compile, sentence-transformers, open_clip, Inf-CL, and CCE and QuACK as row
losses.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from cosup.bench.measure import Loss


class Peer(NamedTuple):
    make: Callable[[], Loss]  # imports what it needs; ImportError: not installed
    needs_cuda: bool = False


def losses(peers: dict[str, Peer] | None = None) -> tuple[dict[str, Loss], dict[str, str]]:
    """Every peer that can run here, fresh, and for each of the others why it cannot."""
    found: dict[str, Loss] = {}
    absent: dict[str, str] = {}
    for name, peer in (PEERS if peers is None else peers).items():
        if peer.needs_cuda and not torch.cuda.is_available():
            absent[name] = "needs CUDA"
            continue
        try:
            found[name] = peer.make()
        except ImportError as error:
            absent[name] = f"not installed ({error})"
        except Exception as error:  # its package is there but broken: a result, as when it fails later
            found[name] = _raising(error)
    return found, absent


def plain(x: Tensor, w: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(x @ w.mT, target)


def compiled() -> Loss:
    torch.compiler.reset()  # shapes compiled for earlier problems count against its limit, past which it runs eagerly
    return torch.compile(plain, dynamic=False)


def torch_chunked(**options) -> Loss:
    try:
        chosen = torch.nn.LinearCrossEntropyOptions(**options)
    except AttributeError as error:
        raise ImportError("torch >= 2.13 has it") from error
    return lambda x, w, target: F.linear_cross_entropy(x, w, target, options=chosen)


def liger(*, one_chunk: bool) -> Loss:
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    def loss(x: Tensor, w: Tensor, target: Tensor) -> Tensor:
        # a chunk's logits may have chunk_mem_const * N * D elements; the default is 1
        budget = {"chunk_mem_const": -(-len(w) // x.shape[1])} if one_chunk else {}
        return liger_fused_linear_cross_entropy(x, w, target, **budget)

    return loss


def liger_cute() -> Loss:
    """Its function for Hopper alone."""
    from liger_kernel.ops.cutedsl.ops.fused_linear_cross_entropy_sm90 import (
        liger_fused_linear_cross_entropy_sm90 as loss,
    )

    return lambda x, w, target: loss(x, w, target)


def cut_cross_entropy(**options) -> Loss:
    """By default it leaves out gradients that bfloat16 would round to nothing; filter_eps=None: none."""
    from cut_cross_entropy import linear_cross_entropy

    return lambda x, w, target: linear_cross_entropy(x, w, target, impl="cce", **options)


def quack(*, scaled_exp: bool = False, tuned: bool = False) -> Loss:
    """``tuned``: with the sizes of its products that it finds best, in a search of minutes."""
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    options: dict = {"use_scaled_exp": scaled_exp, "tuned": tuned}

    def loss(x: Tensor, w: Tensor, target: Tensor) -> Tensor:
        # chunks of 4096 rows by default; with 4096 features its scaled form cannot tell rows from columns
        chunk = {"chunk_size": 2048} if scaled_exp and x.shape[1] == 4096 else {}
        return chunked_linear_cross_entropy(x, w, target, **options, **chunk)

    return loss


def _raising(error: Exception) -> Loss:
    def loss(x: Tensor, w: Tensor, target: Tensor) -> Tensor:
        raise error

    return loss


PEERS = {
    "plain": Peer(lambda: plain),
    "torch.compile": Peer(compiled),
    "torch chunked": Peer(torch_chunked),
    "torch accurate": Peer(lambda: torch_chunked(acc_policy="accurate")),
    "torch one chunk": Peer(lambda: torch_chunked(chunking_method=None)),
    "Liger": Peer(lambda: liger(one_chunk=False), needs_cuda=True),
    "Liger one chunk": Peer(lambda: liger(one_chunk=True), needs_cuda=True),
    "Liger CuTe": Peer(liger_cute, needs_cuda=True),
    "CCE": Peer(lambda: cut_cross_entropy(), needs_cuda=True),
    "CCE exact": Peer(lambda: cut_cross_entropy(filter_eps=None), needs_cuda=True),
    "QuACK base": Peer(quack, needs_cuda=True),
    "QuACK scaled-exp": Peer(lambda: quack(scaled_exp=True), needs_cuda=True),
}
SEARCHING = {"QuACK tuned": Peer(lambda: quack(tuned=True), needs_cuda=True)}  # for minutes: met where that is asked


def contrastive(temperature: float, symmetric: bool) -> dict[str, Peer]:
    """The peers of info_nce; those that have one direction alone are left out where both are asked."""

    def plain(x: Tensor, w: Tensor, target: Tensor) -> Tensor:
        z = x @ w.mT / temperature
        rows = F.cross_entropy(z, target)
        return (rows + F.cross_entropy(z.mT[target], torch.arange(len(x), device=x.device))) / 2 if symmetric else rows

    def compiled() -> Loss:
        torch.compiler.reset()
        return torch.compile(plain, dynamic=False)

    def as_rows(make: Callable[[], Loss]) -> Callable[[], Loss]:
        loss = make()
        return lambda: lambda x, w, target: loss(x / temperature, w, target)

    found = {
        "plain": Peer(lambda: plain),
        "torch.compile": Peer(compiled),
        "sentence-transformers": Peer(lambda: sentence_transformers(temperature, symmetric, cached=False)),
        "the same, cached": Peer(lambda: sentence_transformers(temperature, symmetric, cached=True)),
    }
    if symmetric:
        return found | {"open_clip": Peer(lambda: open_clip(temperature))}
    rows = {name: PEERS[name] for name in ("CCE exact", "QuACK base", "QuACK scaled-exp") if name in PEERS}
    of_rows = {name: Peer(lambda p=peer: as_rows(p.make)(), needs_cuda=True) for name, peer in rows.items()}
    return found | of_rows | {"Inf-CL": Peer(lambda: inf_cl(temperature), needs_cuda=True)}


NOTHING = torch.nn.Sequential(torch.nn.Identity())  # what embeds has no part in these losses


def sentence_transformers(temperature: float, symmetric: bool, *, cached: bool) -> Loss:
    from sentence_transformers import losses as theirs
    from sentence_transformers.util import dot_score

    options: dict = {"similarity_fct": dot_score}  # of vectors that are of unit length already
    if symmetric:
        options |= {"directions": ("query_to_doc", "doc_to_query"), "partition_mode": "per_direction"}
    if cached:
        chunked = theirs.CachedMultipleNegativesRankingLoss(NOTHING, 1 / temperature, mini_batch_size=1024, **options)
        return lambda x, w, target: chunked.calculate_loss([[x], [w]])
    loss = theirs.MultipleNegativesRankingLoss(NOTHING, 1 / temperature, **options)
    return lambda x, w, target: loss.compute_loss_from_embeddings([x, w], target)


def open_clip(temperature: float) -> Loss:
    loss = open_clip_losses().ClipLoss()
    return lambda x, w, target: loss(x, w, 1 / temperature)


def open_clip_losses() -> ModuleType:
    """The file of its losses alone: the package imports torchvision, which they do not need."""
    package = importlib.util.find_spec("open_clip")
    if package is None or package.origin is None:
        raise ImportError("no package open_clip")
    spec = importlib.util.spec_from_file_location("open_clip_loss", Path(package.origin).with_name("loss.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def inf_cl(temperature: float) -> Loss:
    from inf_cl import cal_inf_loss

    return lambda x, w, target: cal_inf_loss(x, w, scale=1 / temperature)

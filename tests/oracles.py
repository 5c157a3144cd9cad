"""What losses are compared with: formulas in PyTorch, problems, budgets that make a plan, the error allowed."""

import torch
import torch.nn.functional as F

from cosup.kernels import native
from cosup.plan import Strategy, plan, used
from cosup.walk import cost, resolve

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
BACKENDS = ["reference", *(["native"] if native.AVAILABLE else []), "triton"]  # "fused", of 16-bit numbers, apart
N, M, D = 65, 130, 33


def check(loss, plain, inputs):
    """Value and gradients of ``loss`` against float64 ``plain``; the budget is twice the error of ``plain`` itself."""
    for i, (_, (error, allowed, one_rounding)) in enumerate(errors(loss, plain, inputs)):
        assert error <= 2 * (allowed + one_rounding), f"output {i}: {error:.3g} against {allowed:.3g}"


def errors(loss, plain, inputs):
    """Value and gradients of ``plain`` in float64, each with its largest error by ``loss``, by ``plain``, and by one
    rounding."""

    def run(function, tensors):
        tensors = [t.detach().clone().requires_grad_() for t in tensors]
        value = function(*tensors)
        upstream = torch.linspace(0.5, 1.5, value.numel(), dtype=value.dtype, device=value.device).reshape(value.shape)
        return [value.detach(), *torch.autograd.grad(value, tensors, upstream)]

    truth = run(plain, [t.double() for t in inputs])
    theirs, ours = run(plain, inputs), run(loss, inputs)
    found = []
    for t, p, o in zip(truth, theirs, ours, strict=True):
        error, allowed = (o.double() - t).abs().max(), (p.double() - t).abs().max()
        # what writing a 16-bit output costs at best; an ulp for a float32 one, two for a scalar, exact by luck at times
        dtype = p.dtype if p.ndim else inputs[0].dtype
        one_rounding = (0.5 if dtype.itemsize == 2 else 1 if p.ndim else 2) * torch.finfo(dtype).eps * t.abs().max()
        found.append((t, (float(error), float(allowed), float(one_rounding))))
    return found


def bytes_for(strategy, x, m, backend, ignored=0):
    """A budget that makes the plan take a strategy: all rows at once, blocks of whole rows, or slabs of columns."""
    n, c = len(x) - ignored, cost(x, backend, gathered=True)
    rows, cols = {"one block": (n, m), "row blocks": (-(-n // 2), m), "slabs": (min(n, 16), -(-m // 3))}[strategy]
    c = c._replace(strip=c.strip and 16)  # as the plan has it for such budgets
    budget = used(n, m, rows, cols, c, True) + (0 if strategy == "one block" else 64 * c.tile)
    p = plan(n, m, c, grads=True, weights_known=True, workspace_bytes=budget)
    taken = "slabs" if p.block_cols < m else "row blocks" if p.block_rows < n else "one block"
    assert n <= 20 or m <= 48 or taken == strategy
    return budget


def bytes_for_pool(strategy, query, symmetric):
    """A budget for all logits at once, for blocks of whole rows, or for slabs of columns."""
    c = cost(query, resolve("auto", query), gathered=False, symmetric=symmetric)
    rows, cols = {"one block": (N, M), "row blocks": (33, M), "slabs": (16, 48)}[strategy]
    c = c._replace(strip=c.strip and 16)
    budget = used(N, M, rows, cols, c, True) + (0 if strategy == "one block" else 64 * c.tile)
    p = plan(N, M, c, grads=True, weights_known=True, workspace_bytes=budget)
    in_forward = strategy == "one block" or (strategy == "row blocks" and not symmetric)
    assert (p.strategy is Strategy.GRADS_IN_FORWARD) == in_forward
    assert (p.block_cols < M) == (strategy == "slabs") and (p.block_rows < N) == (strategy != "one block")
    return budget


def pool(dtype, device):
    """Queries, candidates and targets."""
    query, candidates = torch.randn(N, D, device=device).to(dtype), torch.randn(M, D, device=device).to(dtype)
    target = torch.randperm(M, device=device)[:N]
    candidates[target[: N // 2]] += query[: N // 2]  # half of the queries know their answer
    return query, candidates, target


def cross_entropy(x, w, b, target, *, reduction, weight=None, label_smoothing=0.0, z_loss=0.0, logit_scale=1.0,
            logit_softcap=None, token_weight=None, shift=0):  # fmt: skip
    """The docstring of linear_cross_entropy, in PyTorch."""
    z = logit_scale * F.linear(x, w, b)
    if logit_softcap:
        z = logit_softcap * torch.tanh(z / logit_softcap)
    if shift:
        rows = x.shape[1] - shift
        target = torch.cat([target[:, shift:], target.new_full((len(target), shift), -100)], 1)
        if token_weight is not None:
            token_weight = torch.cat([token_weight[:, shift:], token_weight[:, :0].new_zeros(len(target), shift)], 1)
        assert (target[:, rows:] == -100).all()
    keep, z = target != -100, z.flatten(0, -2)
    t = target.clamp(min=0).flatten()
    weight = torch.ones_like(w[:, 0]) if weight is None else weight.to(w.dtype)
    loss = F.cross_entropy(z, t, weight, reduction="none", label_smoothing=label_smoothing)
    loss = (loss + z_loss * z.logsumexp(1) ** 2 if z_loss else loss).view(target.shape)
    per_token = keep.to(w.dtype) if token_weight is None else keep * token_weight.to(w.dtype)
    loss = loss * per_token
    return loss if reduction == "none" else loss.sum() / (per_token * weight[t].view(target.shape)).sum()


def contrastive(query, candidates, *, temperature, target, normalize=True, reduction="mean", hard_negatives=None,
                query_negatives=False, candidate_negatives=False, symmetric=False, candidate_ids=None,
                candidate_bias=None, sample_weight=None, margin=0.0, false_negative_margin=None,
                label_smoothing=0.0):  # fmt: skip
    """The docstring of info_nce, in PyTorch."""
    if normalize:
        query, candidates = F.normalize(query, dim=1), F.normalize(candidates, dim=1)
    n = torch.arange(len(query), device=query.device)
    hit = torch.zeros(len(query), len(candidates), dtype=torch.bool, device=query.device)
    hit[n, target] = True
    similarity = query @ candidates.mT
    z = (similarity - margin * hit.to(similarity.dtype)) / temperature
    if candidate_bias is not None:
        z = z + candidate_bias
    out = torch.zeros_like(hit)
    if candidate_ids is not None:
        out |= candidate_ids == candidate_ids[target][:, None]
    if false_negative_margin is not None:
        out |= similarity > similarity[n, target][:, None] + false_negative_margin
    z = z.masked_fill(out & ~hit, float("-inf"))
    row = z
    if hard_negatives is not None:
        hard = F.normalize(hard_negatives, dim=2) if normalize else hard_negatives
        row = torch.cat([z, torch.einsum("nd,nhd->nh", query, hard.to(query.dtype)) / temperature], 1)
    same = torch.zeros_like(hit) if candidate_ids is None else candidate_ids == candidate_ids[target][:, None]
    if query_negatives:
        alike = same[:, target] | torch.eye(len(query), dtype=torch.bool, device=query.device)
        row = torch.cat([row, (query @ query.mT / temperature).masked_fill(alike, float("-inf"))], 1)
    if candidate_negatives:
        among = candidates[target] @ candidates.mT / temperature
        row = torch.cat([row, among.masked_fill(same | hit, float("-inf"))], 1)
    kept = ~(out & ~hit)
    spread = (row.logsumexp(1, keepdim=True) - z).masked_fill(~kept, 0.0).sum(1) / kept.sum(1)
    loss = (1 - label_smoothing) * (row.logsumexp(1) - z[n, target]) + label_smoothing * spread
    if symmetric:
        loss = (loss + F.cross_entropy(z.mT[target], n, reduction="none")) / 2
    weight = torch.ones_like(loss) if sample_weight is None else sample_weight.to(loss.dtype)
    loss = loss * weight
    return loss if reduction == "none" else loss.sum() / weight.sum()


def of_positives(q, c, temperature, positive, pool, *, bias=None, weight=None, label_smoothing=0.0, reduction="mean"):
    """The docstring of info_nce with several positives of a query, in PyTorch."""
    z = F.normalize(q, dim=1) @ F.normalize(c, dim=1).mT / temperature
    z = z if bias is None else z + bias
    if pool == "mean":
        pooled = (z * positive).sum(1) / positive.sum(1).clamp(min=1)
    else:
        pooled = torch.where(positive.any(1)[:, None], z.masked_fill(~positive, float("-inf")), z).logsumexp(1)
    loss = (1 - label_smoothing) * (z.logsumexp(1) - pooled) + label_smoothing * (z.logsumexp(1) - z.mean(1))
    weight = (torch.ones_like(loss) if weight is None else weight.to(loss.dtype)) * positive.any(1)
    loss = torch.where(positive.any(1), loss, 0.0) * weight
    return loss if reduction == "none" else loss.sum() / weight.sum()


def of_pairs(query, candidates, temperature, bias, target, *, normalize=True, reduction="mean", query_ids=None,
            candidate_ids=None, sample_weight=None):  # fmt: skip
    """The docstring of sigmoid_loss, in PyTorch."""
    if normalize:
        query, candidates = F.normalize(query, dim=1), F.normalize(candidates, dim=1)
    n = torch.arange(len(query), device=query.device)
    z = query @ candidates.mT / temperature + bias
    sign = -torch.ones_like(z)
    sign[n, target] = 1
    pairs = -F.logsigmoid(sign * z)
    if candidate_ids is not None:
        query_ids = candidate_ids[target] if query_ids is None else query_ids
        pairs = pairs.masked_fill((candidate_ids == query_ids[:, None]) & (sign < 0), 0.0)
    weight = torch.ones_like(z[:, 0]) if sample_weight is None else sample_weight.to(z.dtype)
    loss = weight * pairs.sum(1)
    return loss if reduction == "none" else loss.sum() / (weight.sum() if reduction == "mean" else 1)

"""Plant each bug in the sources, run the test that must catch it, restore; exit 1 if a bug survives.

    python tests/planted_bugs.py [word in the bug's name]

Changes files in place and puts them back: run it on a clean checkout.
"""

# ruff: noqa: E501  a bug in one line reads better

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]


class Bug(NamedTuple):
    name: str
    file: str
    good: str
    bad: str
    test: str
    build: bool = False  # the native library must be rebuilt


TRAIN_RANKS = "tests/test_train_ranks.py"
RING = "tests/test_distributed.py -k contrastive_equals_one_process"
LONGEST = 300  # seconds of a test
POSITIVES, COMPAT = "tests/test_positives.py", "tests/test_compat.py"
LOSSES, OPS, TILES = "tests/test_losses.py", "tests/test_ops.py", "tests/test_tiles.py"
DISTRIBUTED, NCE = "tests/test_distributed.py", "tests/test_info_nce.py"
NATIVE, STATS, GRAD = "kernels/cpu/tile_kernels.cpp", "kernels/tile_stats.py", "kernels/tile_grad.py"
FUSED = "kernels/product_stats.py"
PATCHING, PATCH = "cosup/patching.py", "tests/test_patching.py"
PACKING = "tests/test_packing.py"
SENTENCES, OF_SENTENCES = "cosup/integrations/sentence_transformers.py", "tests/test_integrations_sentence_transformers.py"
ARCHITECTURES = "tests/test_patching_architectures.py"
SITE = "tests/test_site.py"
PAIRS, SIGMOID = "tests/test_sigmoid.py", "kernels/tile_sigmoid.py"
BUGS = [
    Bug("loss: log-sum-exp rounds first", "kernels/reference.py", "self.sum.log() + (self.max - self.target)",
        "(self.sum.log() + self.max).bfloat16().to(self.max.dtype) - self.target", LOSSES + " -k cross_entropy_error"),
    Bug("dX: of the last strip only", "cosup/walk.py", "c.start == (self.s.start if self.apart else 0)",
        "(c.start == self.s.start or not self.apart)", LOSSES + " -k info_nce_error"),
    Bug("dX: of the last slab only", "cosup/walk.py", "c.start == (self.s.start if self.apart else 0)",
        "c.start == self.s.start", LOSSES + " -k info_nce_error"),
    Bug("dX: 16-bit sums over strips", "cosup/walk.py", "not (self.several_strips and dx.element_size() < 4)", "True",
        LOSSES + " -k many_strips"),
    Bug("dW: of the last row block only", "cosup/walk.py", "coef.mT, self.x_r, first=self.r.start == 0)",
        "coef.mT, self.x_r, first=True)", LOSSES + " -k cross_entropy_error"),
    Bug("dW: 16-bit sums", "cosup/walk.py", "or grad.element_size() >= 4:", "or True:", LOSSES + " -k many_blocks"),
    Bug("dbias: scaled twice", "cosup/walk.py", "dbias /= p.scale", "pass", LOSSES + " -k every_feature"),
    Bug("dtemperature: sign", "cosup/ops.py", "rows = _times(v.b, excess)", "rows = -_times(v.b, excess)",
        LOSSES + " -k info_nce_error"),
    Bug("label smoothing: not in the gradient", NATIVE, "0.f : e * soft[j];", "0.f : 0.f;", LOSSES + " -k every_feature", True),
    Bug("label smoothing: not over the classes' number", "cosup/softmax.py", "label_smoothing * weight / count.clamp(min=1)",
        "label_smoothing * weight / (count + 1)", LOSSES + " -k every_feature"),
    Bug("class weight: of the column, not the target", "cosup/ops.py", "vector[target.clamp(0, m - 1)]",
        "vector[target.clamp(0, m - 1) - 1]", LOSSES + " -k every_feature"),
    Bug("class weight: mean over rows", "cosup/softmax.py", "divisor = b.sum()", "divisor = weight.sum()", LOSSES + " -k every_feature"),
    Bug("z-loss: half its gradient", "cosup/walk.py", "a = a + v.q * state.lse()", "a = a + v.q * state.lse() / 2",
        LOSSES + " -k every_feature"),
    Bug("token weight: not shifted", "cosup/losses.py", "F.pad(token_weight, (0, shift))[..., shift:].reshape(-1) if shift",
        "token_weight.reshape(-1) if shift", LOSSES + " -k every_feature"),
    Bug("shift: by one too few", "cosup/losses.py", "F.pad(target, (0, shift), value=ignore_index)[..., shift:]",
        "F.pad(target, (0, shift - 1), value=ignore_index)[..., shift - 1:]", LOSSES + " -k every_feature"),
    Bug("entropy: gradient without its mean", "cosup/walk.py", "a = a + _over(v.h * state.dot, state.sum)", "pass",
        LOSSES + " -k entropy_have"),
    Bug("entropy: mean logit kept whole", NATIVE, "e * (z[j] - safe);", "e * z[j];", TILES + " -k stats_match", True),
    Bug("temperature: before the softcap", "cosup/losses.py", "None if logit_softcap is None else logit_softcap / temperature",
        "logit_softcap", LOSSES + " -k entropy_have"),
    Bug("class weight: inf of an absent class", "cosup/softmax.py", "own.masked_fill(~valid, 0.0)", "own", LOSSES + " -k infinite"),
    Bug("budget: refused by the backward pass only", "cosup/ops.py", "    if any(need[:GRADS]):  # a budget", "    if False:  # a budget",
        LOSSES + " -k refused_before"),
    Bug("rank: 16-bit threshold a step too high", "cosup/walk.py", "raised_r.to(x.dtype)  #", "1.01 * raised_r  #",
        LOSSES + " -k top1_hardly"),
    Bug("memory: the PyTorch kernels' tiles", "cosup/walk.py", "REFERENCE_COPIES = 9", "REFERENCE_COPIES = 6", OPS + " -k reference_path"),
    Bug("oneDNN: sums in one chain", "cosup/gemm.py", "CHAIN = 256", "CHAIN = 1 << 20", "tests/test_gemm.py"),
    Bug("LoRA: without its scaling", "cosup/losses.py", "return factor[0] * (x.masked", "return 1.0 * (x.masked",
        LOSSES + " -k adapted"),
    Bug("LoRA: gradient of the base's rows", "cosup/walk.py", "dx2, dw2 = (products[1].dx, products[1].dw)",
        "dx2, dw2 = (products[1].dx, products[1].dw * 0)", LOSSES + " -k adapted"),
    Bug("batch-invariant: blocks after the batch", "cosup/ops.py", "INVARIANT_ROWS[p.x.device.type] if invariant else len(p.target)",
        "len(p.target)", LOSSES + " -k invariant"),
    Bug("batch-invariant: ignored rows left out", "cosup/ops.py", "if valid.all() or invariant:", "if valid.all():",
        LOSSES + " -k invariant"),
    Bug("ranks: statistics not merged", "cosup/walk.py", "if known is None and p.shard is not None and s.stop == m:", "if False:",
        DISTRIBUTED + " -k vocabulary"),
    Bug("ranks: dX of one rank only", "cosup/walk.py", "                sum_over_ranks(product.dx, p.shard)", "                pass",
        DISTRIBUTED + " -k vocabulary"),
    Bug("ranks: merged without the maximum", "cosup/distributed.py", "decay = torch.exp(state.max - safe)", "decay = 1.0",
        DISTRIBUTED + " -k vocabulary"),
    Bug("ranks: smoothing over this rank's classes", "cosup/ops.py", "    for t in (values, sums):", "    for t in (values,):",
        DISTRIBUTED + " -k vocabulary"),
    Bug("ranks: rank counted against part of the targets", "cosup/walk.py", "(fused or plan.block_cols < m or p.shard is not None)",
        "(fused or plan.block_cols < m)", DISTRIBUTED + " -k vocabulary"),
    Bug("gradcheck: softcap chain", "kernels/reference.py", "1 - (z_RS / softcap) ** 2", "1 - (z_RS / softcap)",
        OPS + " -k gradcheck"),
    Bug("loss: upstream gradient dropped", "cosup/ops.py", "return grad.mul_(factor)", "return grad",
        LOSSES + " -k cross_entropy_error"),
    Bug("opcheck: fake of another dtype", "cosup/ops.py", "torch.empty_like(target, dtype=torch.int32)]",
        "torch.empty_like(target)]", OPS + " -k opcheck"),
    Bug("opcheck: operator mutates its input", "cosup/ops.py", "    blocks = _plan(p, backend, invariant, grads=False",
        "    x.add_(1)\n    blocks = _plan(p, backend, invariant, grads=False", OPS + " -k opcheck"),
    Bug("compile: two graphs", "cosup/softmax.py", "    weight = weight.masked_fill(~valid, 0.0)\n",
        "    weight = weight.masked_fill(~valid, 0.0)\n    torch._dynamo.graph_break()\n", OPS + " -k fullgraph"),
    Bug("memory: a second tile", "cosup/walk.py", "    fused = plan.merged_cols > 1",
        "    second = torch.empty(min(plan.block_rows, n), plan.block_cols)\n    fused = plan.merged_cols > 1", OPS + " -k peak"),
    Bug("ids: the positive masks itself", "kernels/reference.py", "== row_id_R[:, None]) & ~hit_RS",
        "== row_id_R[:, None])", LOSSES + " -k info_nce_error"),
    Bug("stats: rank counts ties", NATIVE, "chunk_above += z[j] > threshold", "chunk_above += z[j] >= threshold",
        TILES + " -k equal_logits", True),
    Bug("ignored rows: poison the table's gradient", "cosup/walk.py", "if p.rows is not None:\n        return x[p.rows[r]]",
        "if False:\n        return x[p.rows[r]]", LOSSES + " -k ignored_rows"),
    Bug("second backward: in place though the graph is kept", "cosup/ops.py",
        "if traced or torch._C._autograd._get_current_graph_task_keep_graph():", "if traced:", LOSSES + " -k second_backward"),
    Bug("labels: out of range accepted", "cosup/ops.py", "(target >= m))", "(target > m))", LOSSES + " -k out_of_range"),
    Bug("native: softcap's derivative", NATIVE, "c[j] * (1.f - t * t);", "c[j];", TILES + " -k grad_matches", True),
    Bug("native: tail of a row", NATIVE, "std::min(CHUNK, S - first)", "std::min(CHUNK, (S - first + 1) / 2 * 2)",
        TILES + " -k stats_match", True),
    Bug("native: NaN swallowed", NATIVE, "return x < -87.3f ? 0.f :", "return !(x > -87.3f) ? 0.f :", TILES + " -k nan", True),
    Bug("triton: tile of -inf", STATS, 'tl.where(new == float("-inf"), 0.0, new)', "new", TILES + " -k masked_tile"),
    Bug("triton: column offset", GRAD, "col0 + s == target", "s == target", TILES + " -k grad_matches"),
    Bug("triton: spills", "tests/test_triton_compile.py", "{\"num_warps\": num_warps,",
        "{\"maxnreg\": 24, \"num_warps\": num_warps,", "tests/test_triton_compile.py -k 80"),
    Bug("plan: over the budget", "cosup/plan.py", "total = rows * (padded(", "total = rows // 2 * (padded(",
        OPS + " -k peak"),
    Bug("bench: no gradient error", "bench/measure.py", "return (off.norm() / size.norm()).item(), ", "return 0.0, ",
        "tests/test_bench.py"),
    Bug("Liger: z-loss over the sum of weights", "cosup/compat/liger.py", "(total / count.clamp(min=1)).item()", "1.0", COMPAT + " -k liger"),
    Bug("Liger: token scaling as a weighted mean", "cosup/compat/liger.py", 'o.use_token_scaling and o.reduction == "mean"', "False",
        COMPAT + " -k liger"),
    Bug("Liger: z-loss not scaled", "cosup/compat/liger.py", "(1.0 if scaling is None else scaling)", "1.0", COMPAT + " -k beside"),
    Bug("Liger: accuracy over ignored rows too", "cosup/compat/liger.py", "stats.top1.sum() / count", "stats.top1.float().mean()",
        COMPAT + " -k beside"),
    Bug("Liger: module's options swapped", "cosup/compat/liger.py", "_Options(ce_weight, ignore_index, lse_square_scale, label_smoothing, reduction, softcap,\n                                return_z_loss",
        "_Options(ce_weight, ignore_index, label_smoothing, lse_square_scale, reduction, softcap,\n                                return_z_loss", COMPAT + " -k module"),
    Bug("CCE: the first rows cut off", "cosup/compat/cut_cross_entropy.py", "loss[..., : length - shift]", "loss[..., shift:]", COMPAT + " -k cce_error"),
    Bug("CCE: mean over all rows", "cosup/compat/cut_cross_entropy.py", "(predicted != ignore_index).sum()", "(predicted == predicted).sum()",
        COMPAT + " -k cce_error"),
    Bug("CCE: log-sum-exp without gradient", "cosup/compat/cut_cross_entropy.py", "stats.nll, stats.lse, targets", "stats.nll, stats.lse.detach(), targets",
        COMPAT + " -k cce_error"),
    Bug("CCE: ranges of a head not compared", "cosup/compat/cut_cross_entropy.py", "if starts != [0, *stops[:-1]] or ", "if ", COMPAT + " -k split"),
    Bug("layout: an import against the flow", "cosup/plan.py", "from enum import Enum\n",
        "from enum import Enum\n\nimport cosup.losses\n", "tests/test_layout.py"),
    Bug("fused: the right half's statistic over the left one's", FUSED, "_leave(right, i, 2 * j + 1,", "_leave(right, i, 2 * j,",
        TILES + " -k merged"),
    Bug("fused: last group taken for a whole one", FUSED, "tl.minimum(row_tiles - top, GROUP)", "GROUP", TILES + " -k merged"),
    Bug("fused: entropy not shifted when merged", FUSED, "(dot + total * lag) * decay", "dot * decay", TILES + " -k merged"),
    Bug("fused: the target above itself", FUSED, " - (here & (own_r > threshold)).to(tl.float32)", "", TILES + " -k merged"),
    Bug("fused: tiles that spill", FUSED, "target.arch >= 100 or not features", "True", "tests/test_triton_compile.py -k cuda:90"),
    Bug("fused: products off the matrix units", FUSED, "dot = tl.dot(x_RD, w_SD.T, dot)",
        "dot = tl.dot(x_RD.to(tl.float32), w_SD.T.to(tl.float32), dot, input_precision='ieee')",
        "tests/test_triton_compile.py -k cuda:90"),
    Bug("fused: rank against a rounded logit", "cosup/walk.py", "x.is_cuda or plan.merged_cols > 1", "x.is_cuda",
        LOSSES + " -k fused_statistics"),
    Bug("memory: two sums of dW at once", "cosup/walk.py", "        self.dw_sum: Tensor | None = None  #", "        #",
        OPS + " -k peak_memory"),
    Bug("ranks: each plans by its own budget", "cosup/distributed.py", "min(budgets))", "budgets[group.rank()])", DISTRIBUTED),
    Bug("CUDA: the host waits for the divisor", "cosup/softmax.py", "divisor = torch.where(divisor == 0, 1.0, divisor)",
        "divisor = divisor if divisor else 1.0", OPS + " -k host_reads"),
    Bug("columns: statistic of the last row block only", "kernels/cpu/tile_kernels.cpp", "sum[j] = sum_state[j], edot[j] = dot_state[j]",
        "sum[j] = 0, edot[j] = 0", NCE + " -k every_feature", True),
    Bug("columns: their own target forgotten", "cosup/walk.py", "b + of_target * p.scale, e, h", "b, e, h",
        NCE + " -k every_feature"),
    Bug("columns: masked for rows only", NATIVE, "{row_id ? row_id + r : nullptr, limit ? limit + r : nullptr}, z);", "{}, z);",
        NCE + " -k every_feature", True),
    Bug("columns: temperature of rows only", "cosup/ops.py", "        rows = rows + of_columns", "        pass", NCE + " -k every_feature"),
    Bug("temperature: the bias scaled too", "cosup/ops.py", "total = total - (bias * dbias).sum(dtype=torch.float64)", "pass",
        NCE + " -k every_feature"),
    Bug("margin: in the statistic only", NATIVE, "z[own - first] = target_logit - f.margin;", "z[own - first] = target_logit;",
        NCE + " -k every_feature", True),
    Bug("false negatives: the target's own limit", "cosup/walk.py", "scaled_only=True) + gap * p.scale",
        "scaled_only=True) + gap", NCE + " -k every_feature"),
    Bug("smoothing: over those left out too", "cosup/softmax.py", "(total, count) if kept is None else (kept, kept)", "(total, count)",
        NCE + " -k every_feature"),
    Bug("hard negatives: not in the entropy", "cosup/contrastive.py", "nll, lse, -nll, entropy, place", "nll, lse, -nll, stats.entropy, place", NCE + " -k stats"),
    Bug("further negatives: their entropy", "cosup/contrastive.py", "(entropy_NG + gap_NG)", "gap_NG", NCE + " -k query_negatives"),
    Bug("query negatives: a query against itself", "cosup/contrastive.py", 'margin=float("inf")', "margin=0.0", NCE + " -k every_feature"),
    Bug("query negatives: ids forgotten", "cosup/contrastive.py", "own, row_id, pool.ids_of_queries, **options", "own, None, None, **options", RING),
    Bug("triangle: ids forgotten", "cosup/contrastive.py", "_others_alike(pool.query, row_id, **options)", "_others_alike(pool.query, None, **options)",
        NCE + " -k triangle"),
    Bug("candidate negatives: by the queries", "cosup/contrastive.py", "of_target = pool.candidates[pool.target]", "of_target = pool.query",
        NCE + " -k every_feature"),
    Bug("query negatives: own place on another rank", "cosup/contrastive.py", "own = pool.first_query + torch", "own = torch", RING),
    Bug("triangle: pairs of a block twice", "cosup/walk.py", "dtype=torch.bool).tril_(r.start - c.start)", "dtype=torch.bool).tril_(r.start - c.start - 1)",
        NCE + " -k triangle"),
    Bug("triangle: all of the square", "cosup/walk.py", "r.start // ALIGN * ALIGN) if p.triangle", "0) if p.triangle", NCE + " -k half_of_a_square"),
    Bug("triangle: rows without their columns", "cosup/ops.py", "top, total, dot = joined(ColumnState(*state[:3]), columns.state)", "top, total, dot = state[:3]",
        NCE + " -k triangle"),
    Bug("triangle: gradient as a row alone", "cosup/ops.py", "return (dx + dw).to(x.dtype)", "return dx.to(x.dtype)", NCE + " -k triangle"),
    Bug("false negatives: by the bias too", NATIVE, "dot[first + j] * scale > limit ?", "z[j] > limit ?", TILES + " -k specification", True),
    Bug("symmetric: far above the base", NATIVE, "factor == 0.f ? 0.f : fast_exp", "false ? 0.f : fast_exp", NCE + " -k far_above", True),
    Bug("checkpointing: saved tensors twice", "cosup/ops.py", "    saved = ctx.saved_tensors  #", "    saved = ctx.saved_tensors and ctx.saved_tensors  #", NCE + " -k checkpointing"),
    Bug("further negatives: no weight at all", "cosup/contrastive.py", "torch.where(total == 0, 1.0, total) if once", "total if once", NCE + " -k no_weight"),
    Bug("smoothing: in float32", "cosup/softmax.py", "label_smoothing * weight / count.clamp(min=1)", "label_smoothing / count.clamp(min=1) * weight", NCE + " -k digits"),
    Bug("unit: a row of zeros overflows", "cosup/contrastive.py", ".clamp(-most, most)", "", NCE + " -k row_of_zeros"),
    Bug("matryoshka: hard negatives whole", "cosup/nn.py", "hard[..., :d]}", "hard[..., : self.dims[0]]}", NCE + " -k matryoshka"),
    Bug("unit: gradient along the vector", "cosup/contrastive.py", "(wide - along * unit) / long", "wide / long", NCE + " -k gradcheck"),
    Bug("sample weight: mean over queries", "cosup/softmax.py", "weights, weight = weights.map(lambda v: v / divisor), weight / divisor",
        "weights, weight = weights.map(lambda v: v / divisor), weight / len(weight)", NCE + " -k every_feature"),
    Bug("ranks: gradients of gathered rows stay", "cosup/distributed.py", "dist.all_to_all_single(parts, grad.contiguous()",
        "parts.zero_() or dist.all_to_all_single(parts.clone(), grad.contiguous()", DISTRIBUTED + " -k contrastive_equals"),
    Bug("ranks: columns of the queries here", "cosup/ops.py", "        merge_columns(columns.state, row_group)\n    return _statistics",
        "        pass\n    return _statistics", DISTRIBUTED + " -k contrastive_equals"),
    Bug("ranks: mean over the queries here", "cosup/contrastive.py", "total = SumOverRanks.apply(weight.sum(), process_group)",
        "total = weight.sum()", DISTRIBUTED + " -k contrastive_equals"),
    Bug("ranks: detached candidates get gradients", "cosup/distributed.py", "    if gradients:\n        return _Gather", "    if True:\n        return _Gather",
        DISTRIBUTED + " -k own_gradients"),
    Bug("positives: all weigh alike", "cosup/positives.py", "        return torch.exp(self.logit - self.pooled()[self.row])",
        "        return (1 / self.counts.to(self.logit.dtype))[self.row]", POSITIVES + " -k gradcheck"),
    Bug("positives: their coefficients not written", "cosup/walk.py", "        of_pairs(out, features[0])", "        pass", POSITIVES + " -k error"),
    Bug("positives: one target's part besides", "cosup/walk.py", "return a, torch.zeros_like(b), e, h", "return a, b, e, h", POSITIVES + " -k error"),
    Bug("positives: bias forgotten", "cosup/positives.py", "        if bias_S is not None:", "        if False:", POSITIVES + " -k error"),
    Bug("positives: temperature's gradient by the pooled logit", "cosup/ops.py", "excess = excess + p.positives.entropy()", "pass", POSITIVES + " -k gradcheck"),
    Bug("positives: rank of the first", "cosup/walk.py", "target=p.positives._replace(logit=logit).best())", "target=p.positives.best())", POSITIVES + " -k best"),
    Bug("positives: others count in the rank", "cosup/ops.py", "state.above.sub_(p", "(p", POSITIVES + " -k before_another"),
    Bug("positives: queries without any have weight", "cosup/contrastive.py", "weight is None else weight * some", "weight is None else weight", POSITIVES + " -k error"),
    Bug("positives: elsewhere overwrites here", "cosup/positives.py", "torch.where(inside, col, cols), inside", "torch.where(inside, col, 0), inside", POSITIVES + " -k elsewhere"),
    Bug("positives: columns of another rank", "cosup/contrastive.py", "positives[1] + pool.first", "positives[1]", DISTRIBUTED + " -k listed"),
    Bug("ring: target's logit of a later part", "cosup/walk.py", "known is None and before is None and (fused", "known is None and (fused",
        DISTRIBUTED + " -k ring_in_slabs"),
    Bug("ring: gradient of the rows by the last part", "cosup/walk.py", "fresh = not self.dx_before and c.start", "fresh = c.start", RING),
    Bug("ring: columns' statistics stay", "cosup/ring.py", "own = Columns(joined(own.state, ColumnState(*found)))", "pass", RING),
    Bug("ring: the last part's gradients are lost", "cosup/ring.py", "    _add(totals, found, swap)\n    return", "    return", RING),
    Bug("ring: ids stay", "cosup/ring.py", "bias=bias, col_id=col_id", "bias=bias", RING),
    Bug("ring: columns count from here", "cosup/ring.py", "col0=first[home]", "col0=first[peers.rank]", RING),
    Bug("ring: read before it is here", "cosup/ring.py", "        swap.wait()\n        here = coming", "        here = coming", RING),
    Bug("ring: a part more", "cosup/ring.py", "        yield Visit(step,", "        peers.kept = [*getattr(peers, 'kept', []), here[0].clone()]\n        yield Visit(step,",
        DISTRIBUTED + " -k memory_of_a_ring"),
    Bug("processes: the mean of gradients", "cosup/train.py", "lambda grad: grad * self.args.world_size", "lambda grad: grad", TRAIN_RANKS + " -k joint"),
    Bug("processes: own candidates alone", "cosup/train.py", "(self._further(inputs), self._group) if model.training", "(self._further(inputs), None) if model.training", TRAIN_RANKS + " -k joint"),
    Bug("processes: own normalisers", "cosup/train.py", "        self._sum_over_ranks(counts)\n        if self._extra", "        if self._extra", TRAIN_RANKS + " -k joint"),
    Bug("processes: tokens counted twice", "cosup/train.py", "        self._sum_over_ranks(counts)\n        if self._extra", "        self._sum_over_ranks(self._sum_over_ranks(counts))\n        if self._extra", TRAIN_RANKS + " -k joint"),
    Bug("processes: own hits in the log", "cosup/train.py", "counts = self._sum_over_ranks(self._row(_hits(output), output.nsp_count, tokens))", "counts = self._row(_hits(output), output.nsp_count, tokens)", TRAIN_RANKS + " -k joint"),
    Bug("processes: NTP of the others forgotten", "cosup/losses.py", "            ntp_loss = ntp_loss + elsewhere", "            ntp_loss = ntp_loss + 0 * elsewhere", TRAIN_RANKS + " -k loss_over_ranks"),
    Bug("processes: NSP over own queries", "cosup/losses.py", "nsp_normalizer = counts[1].clamp(min=1) if nsp", "nsp_normalizer = max(len(query), 1) if nsp", TRAIN_RANKS + " -k loss_over_ranks"),
    Bug("processes: gather is always exact", "cosup/train.py", "gather=self._gather,", "gather=\"exact\",", TRAIN_RANKS + " -k gather_says"),
    Bug("processes: unused parameters are looked for", "cosup/train.py", "args.ddp_find_unused_parameters = False", "args.ddp_find_unused_parameters = True", TRAIN_RANKS + " -k joint"),
    Bug("processes: Ctx waited for in mode ntp", "cosup/train.py", "_set_params_and_buffers_to_ignore_for_model(model, of_ctx)", "_set_params_and_buffers_to_ignore_for_model(model, [])", TRAIN_RANKS + " -k ntp"),
    Bug("processes: Ctx not run without passages", "cosup/train.py", "        idle = self._group is not None and", "        idle = False and", TRAIN_RANKS + " -k without_a_query"),
    Bug("processes: cached: own candidates alone", "cosup/train.py", "\"nsp\", counts, further, self._group)", "\"nsp\", counts, further, None)", TRAIN_RANKS + " -k micro_batches"),
    Bug("processes: cached: gradients not summed", "cosup/train.py", "with nullcontext() if part is parts[-1] else", "with", TRAIN_RANKS + " -k micro_batches"),
    Bug("processes: cached: own NTP in the log", "cosup/train.py", "        self._sum_over_ranks(ntp_loss)\n", "", TRAIN_RANKS + " -k micro_batches"),
    Bug("processes: the queue counts on each", "cosup/train.py", "parts.append((past[self._share], past_ids[self._share]))", "parts.append((past, past_ids))", TRAIN_RANKS + " -k count_once"),
    Bug("processes: a queue of its own", "cosup/train.py", "process_group=self._group, device=args.device", "device=args.device", TRAIN_RANKS + " -k count_once"),
    Bug("processes: drawn passages on each", "cosup/train.py", "[: self._extra_passages][self._share]", "[: self._extra_passages]", TRAIN_RANKS + " -k shared_out"),
    Bug("processes: drawn passages that others hold", "cosup/train.py", "            held = sum(everywhere, [])\n", "", TRAIN_RANKS + " -k shared_out"),
    Bug("processes: local draws alike", "cosup/train.py", "name += f\" {self.args.process_index}\"", "pass", TRAIN_RANKS + " -k shared_out"),
    Bug("processes: held-out rows twice", "cosup/train.py", "self.accelerator.even_batches, False", "self.accelerator.even_batches, True", TRAIN_RANKS + " -k held_out"),
    Bug("processes: own held-out sums", "cosup/train.py", "self._sum_over_ranks(sums).tolist()", "sums.tolist()", TRAIN_RANKS + " -k held_out"),
    Bug("processes: the queue resumed on one", "cosup/train.py", "            if self.queue is not None:\n                self.queue.load", "            if self.queue is not None and self.args.should_save:\n                self.queue.load", TRAIN_RANKS + " -k resumed"),
    Bug("processes: the log resumed on one", "cosup/train.py", "            self._sums = torch.tensor(interval", "            self._sums = self.args.should_save * torch.tensor(interval", TRAIN_RANKS + " -k resumed"),
    Bug("processes: fewer held-out batches on one", "cosup/train.py", "        if len(dataloader) < most:", "        if False:", TRAIN_RANKS + " -k held_out"),
    Bug("processes: shards saved", "cosup/train.py", "str(self.args.output_dir), state_dict)", "str(self.args.output_dir))", TRAIN_RANKS + " -k resumed"),
    Bug("processes: a scalar is sharded", "cosup/model.py", "torch.tensor([math.log(config.temperature)], ", "torch.tensor(math.log(config.temperature), ", TRAIN_RANKS + " -k sharded"),
    Bug("processes: FSDP1 taken", "cosup/train.py", "        if not self.accelerator.is_fsdp2:", "        if plugin and not self.accelerator.is_fsdp2:", TRAIN_RANKS + " -k refused"),
    Bug("processes: layers sharded as one", "cosup/model.py", "self._no_split_modules = sorted(layers &", "self._no_split_modules = sorted(set() &", TRAIN_RANKS + " -k sharded"),
    Bug("processes: uneven batches taken", "cosup/train.py", "        if not even or dispatch:", "        if dispatch:", TRAIN_RANKS + " -k refused"),
    Bug("sigmoid: the target a negative too", NATIVE, "y[own - first] = -INF;", ";", TILES + " -k sigmoid_stats", True),
    Bug("sigmoid: digits of a tiny softplus", NATIVE, "(y > 0.f ? y : 0.f) + fast_log1p(e)", "(y > 0.f ? y : 0.f) + std::log(1.f + e)",
        TILES + " -k tiny", True),
    Bug("sigmoid: series cut short", NATIVE, "float p = 2.f / 15.f;\n  p = p * s2 + 2.f / 13.f;\n  p = p * s2 + 2.f / 11.f;\n  p = p * s2 + 2.f / 9.f;", "float p = 2.f / 9.f;",
        TILES + " -k tiny", True),
    Bug("sigmoid: a target's gradient by 1 - sigma", NATIVE, "out[own] = -a * fast_sigmoid(own_y, fast_exp(-std::fabs(own_y)));",
        "out[own] = a * (fast_sigmoid(-own_y, fast_exp(-std::fabs(own_y))) - 1.f);", TILES + " -k tiny", True),
    Bug("sigmoid: rows without weight have NaN", NATIVE, "if (a == 0.f) {", "if (false) {", TILES + " -k nan_row", True),
    Bug("sigmoid: NaN swallowed", NATIVE, "return (y > 0.f ? y : 0.f) + fast_log1p(e);", "return y <= 0.f ? fast_log1p(e) : (y > 0.f ? y + fast_log1p(e) : 0.f);",
        TILES + " -k nan_row", True),
    Bug("sigmoid: temperature's sum with the bias", NATIVE, "chunk_dot += g * d[j];", "chunk_dot += g * y[j] / f.scale;", PAIRS + " -k every_feature", True),
    Bug("sigmoid, triton: digits of a tiny softplus", SIGMOID, "tl.maximum(y, 0.0) + s * (p * s2 + 2.0)", "tl.maximum(y, 0.0) + tl.log(1.0 + e)",
        TILES + " -k tiny"),
    Bug("sigmoid, triton: the next tile's target", SIGMOID, "(column == target) & (s < S)", "column == target", TILES + " -k sigmoid_stats"),
    Bug("sigmoid, triton: the target's sign", SIGMOID, "a * sign * g)", "a * g)", TILES + " -k sigmoid_grad"),
    Bug("sigmoid, triton: spills", "tests/test_triton_compile.py", "{\"num_warps\": num_warps,",
        "{**({\"maxnreg\": 24} if \"_sigmoid\" in kernel.__name__ else {}), \"num_warps\": num_warps,", "tests/test_triton_compile.py -k 80"),
    Bug("sigmoid: a tile of whole rows in memory", "cosup/walk.py", "whole = (weights is not None and not p.sigmoid)", "whole = weights is not None",
        OPS + " -k pairs"),
    Bug("sigmoid: planned by whole rows", "cosup/plan.py", "width = strip if cost.strips_alone else cols", "width = cols", OPS + " -k pairs"),
    Bug("sigmoid: planned for two sweeps", "cosup/plan.py", "if grads and weights_known and cost.strips_alone:", "if False:", "tests/test_plan.py"),
    Bug("sigmoid: two sweeps where weights are known", "cosup/contrastive.py", 'known = weight if reduction != "none" and', "known = weight if False and",
        PAIRS + " -k one_sweep"),
    Bug("sigmoid: gradients by the softmax", "cosup/walk.py", "    if p.sigmoid:\n        return weights.b", "    if False:\n        return weights.b", PAIRS + " -k every_feature"),
    Bug("sigmoid: temperature's gradient of one row's weight", "cosup/ops.py", "((of_rows * dot).sum", "((of_rows[:1] * dot).sum", PAIRS + " -k gradcheck"),
    Bug("sigmoid: bias without the upstream gradient", "cosup/ops.py", "dbias = (of_rows * soft)", "dbias = soft", PAIRS + " -k gradcheck"),
    Bug("sigmoid: sample weight without the upstream gradient", "cosup/ops.py", "grad * weight, grad * rows", "grad * weight, rows", PAIRS + " -k every_feature"),
    Bug("sigmoid: fake of gradients not asked", "cosup/ops.py", "wanted = [weight is not None and n for n in need[:2]]", "wanted = need[:2]",
        PAIRS + " -k opcheck"),
    Bug("sigmoid: mean over queries, not weights", "cosup/contrastive.py", "total = weight.sum() if process_group is None", "total = torch.ones_like(weight).sum() if process_group is None",
        PAIRS + " -k every_feature"),
    Bug("sigmoid: budget refused by the backward pass only", "cosup/ops.py", "    if weights is None and any(need[:2]):  # a budget", "    if False:  # a budget",
        PAIRS + " -k refused"),
    Bug("sigmoid: bias not learned", "cosup/nn.py", "self.bias = nn.Parameter(torch.tensor(float(bias)))", "self.bias = torch.tensor(float(bias))",
        PAIRS + " -k module"),
    Bug("sigmoid: mean over the queries here", "cosup/contrastive.py", "else SumOverRanks.apply(weight.sum(), process_group)", "else weight.sum()",
        DISTRIBUTED + " -k pairs"),
    Bug("memory: packed coefficients not counted", "cosup/walk.py", "packed=product if item == 4 else 0", "packed=0", OPS + " -k peak"),
    Bug("packing: first token predicted from the example before", "cosup/data/collate.py", "joined.labels.extend([IGNORE, *row.labels[1:]])",
        "joined.labels.extend(row.labels)", PACKING + " -k one_token"),
    Bug("packing: queries where they were", "cosup/data/collate.py", "(len(joined.ids) + place, passage)", "(place, passage)",
        PACKING + " -k hold_the_unpacked"),
    Bug("packing: a row is never full", "cosup/data/packing.py", "if length <= free", "if length < free", PACKING + " -k first_row_with_room"),
    Bug("packing: positions run on", "cosup/data/packing.py", "torch.cat([torch.arange(length) for length in row])",
        "torch.arange(sum(row))", PACKING + " -k sdpa"),
    Bug("packing: padding mask beside positions", "cosup/model.py", "bounds = attention_mask if position_ids is None else None",
        "bounds = attention_mask", PACKING + " -k eager"),
    Bug("packing: flash-attn without the bounds", "cosup/pretrained.py", "        if _runs_flash(model):", "        if False:",
        PACKING + " -k given_the_bounds"),
    Bug("packing: a small leak passed", "cosup/pretrained.py", "if seen[~second].any():", "if False:", PACKING + " -k would_change"),
    Bug("packing: a model's own positions passed", "cosup/pretrained.py", "if not moved <= max(", "if False and not moved <= max(",
        PACKING + " -k would_change"),
    Bug("packing: positions not trained with", "cosup/train.py", '(*names, "position_ids")', "names", PACKING + " -k logs_the_same"),
    Bug("packing: positions of other micro-batches", "cosup/data/collate.py", "**{name: batch[name][start:stop, :length] for name in of_rows},",
        "**{name: batch[name][: stop - start if name == 'position_ids' else stop][-(stop - start) :, :length] for name in of_rows},",
        PACKING + " -k micro_batches_of_packed"),
    Bug("sentences: cosine for all", SENTENCES, "normalize=self.similarity_fct is cos_sim", "normalize=True", OF_SENTENCES + " -k equals_theirs"),
    Bug("sentences: first negatives only", SENTENCES, "info_nce(query, torch.cat(candidates)", "info_nce(query, torch.cat(candidates[:2])", OF_SENTENCES + " -k equals_theirs"),
    Bug("sentences: scale for temperature", SENTENCES, "temperature=self.temperature", "temperature=self.scale", OF_SENTENCES + " -k equals_theirs"),
    Bug("sentences: documents not told their query", SENTENCES, 'symmetric="doc_to_query" in self.directions', "symmetric=False", OF_SENTENCES + " -k equals_theirs"),
    Bug("sentences: queries no negatives", SENTENCES, 'query_negatives="query_to_query" in self.directions', "query_negatives=False", OF_SENTENCES + " -k equals_theirs"),
    Bug("sentences: documents' negatives of triplets", SENTENCES, 'if "doc_to_doc" in self.directions and len(reps) > 2', "if False", OF_SENTENCES + " -k bad_columns"),
    Bug("sentences: gradients a mean of shares", SENTENCES, "group.size() * (loss", "1 * (loss", OF_SENTENCES + " -k gathered"),
    Bug("sentences: nothing gathered", SENTENCES, "if self.gather_across_devices and", "if False and", OF_SENTENCES + " -k gathered"),
    Bug("sentences: ids of one process", SENTENCES, "blake2b(row[kept].tobytes(), digest_size=8).digest()", 'hash(row[kept].tobytes()).to_bytes(8, "little", signed=True)', OF_SENTENCES + " -k gathered"),
    Bug("sentences: ids of the padding", SENTENCES, "row[kept].tobytes()", "row.tobytes()", OF_SENTENCES + " -k duplicates"),
    Bug("sentences: cached without ids", SENTENCES, "self.forward_cached(columns, ids)", "self.forward_cached(columns)", OF_SENTENCES + " -k duplicates"),
    Bug("sentences: pictures by their text", SENTENCES, "t.shape == tokens.shape == mask.shape for t in tensors", "True for t in tensors", OF_SENTENCES + " -k bad_columns"),
    Bug("sentences: cache not told to MatryoshkaLoss", SENTENCES, "self.uses_gradient_cache = mini_batch_size is not None", "self.uses_gradient_cache = False", OF_SENTENCES + " -k matryoshka"),
    Bug("sentences: never cached", SENTENCES, "if self.mini_batch_size is not None:\n            return", "if False:\n            return", OF_SENTENCES + " -k drops"),
    Bug("sentences: no backward to the cache", SENTENCES, "            loss.backward()\n", "            (2 * loss).backward()\n", OF_SENTENCES + " -k cached"),
    Bug("sentences: an option not in the config", SENTENCES, '"mini_batch_size", "mask_duplicates")', '"mini_batch_size")', OF_SENTENCES + " -k config"),
    Bug("sentences: one forward pass too many", SENTENCES, "for vectors in embed_columns(self.model, columns)]", "for vectors in (self.model(column)[\"sentence_embedding\"] for column in columns)]", OF_SENTENCES + " -k drops"),
    Bug("cache: passage taken in twice", "cosup/generate.py", "position_ids=cached + new", "position_ids=cached + new.clamp(max=1)",
        "tests/test_generate.py"),
    Bug("suite: a failed subject passes", "bench/suite.py", 'return not any(row["failed"] for row in rows)', "return True",
        "tests/test_bench.py -k goes_on"),
    Bug("suite: our own failed row is none", "bench/suite.py", 'and row["method"] in OURS', 'and row["method"] not in OURS',
        "tests/test_bench.py -k row_of_ours"),
    Bug("suite: always quick", "bench/suite.py", "subject.full if full else subject.quick", "subject.quick", "tests/test_bench.py -k published_shapes"),
    Bug("sdist: without the docs", "MANIFEST.in", "recursive-include docs *.md\n", "", "tests/test_packaging.py -k sdist"),
    Bug("sdist: without the native sources", "MANIFEST.in", "recursive-include kernels/cpu *.cpp\n", "", "tests/test_packaging.py -k wheel_is"),
    Bug("wheel: without a package", "setup.py", '"cosup.integrations", ', "", "tests/test_packaging.py -k wheel_is"),
    Bug("card: written over a user's", "cosup/cards.py", "if path.exists() and MARKER not in", "if False and MARKER not in",
        "tests/test_cards.py -k users_card"),
    Bug("card: figures of the first log", "cosup/train.py", "for log in self.state.log_history for name", "for log in reversed(self.state.log_history) for name",
        "tests/test_cards.py -k figures"),
    Bug("card: a folder as base model", "cosup/model.py", "and not Path(name).is_dir() else []", "else []", "tests/test_cards.py -k hub_ids"),
    Bug("resume: random state not restored", "cosup/train.py", "        super()._load_optimizer_and_scheduler(checkpoint)\n",
        "        super()._load_optimizer_and_scheduler(checkpoint)\n        torch.manual_seed(1)\n        self._load_rng_state = lambda _: None\n",
        "tests/test_train.py"),
    Bug("patch: scale forgotten", PATCHING, "return self._with(scale=self.scale * factor)", "return self", PATCH + " -k loss_and_gradients"),
    Bug("patch: scale inside the soft cap", PATCHING, "self.scale if self.cap is None else self.scale * self.cap", "self.scale",
        PATCH + " -k loss_and_gradients"),
    Bug("patch: no bias", PATCHING, "_bias(self.head, self.width)\n", "None\n", PATCH + " -k loss_and_gradients"),
    Bug("patch: scaling of an adapter", PATCHING, "other.scale / self.scale)", "1.0)", PATCH + " -k adapters"),
    Bug("patch: bias of an adapter", PATCHING, "            if head.bias is not None:", "            if False:", PATCH + " -k other_forms"),
    Bug("patch: goes on without logits", PATCHING, "            state.deferring = False", "            pass", PATCH + " -k asked_for"),
    Bug("patch: index to ignore", PATCHING, '"ignore_index": ignore_index', '"ignore_index": -100', PATCH + " -k arguments"),
    Bug("patch: sums for means", PATCHING, "reduction=reduction,", 'reduction="sum",', PATCH + " -k loss_and_gradients"),
    Bug("patch: rows of a view", PATCHING, "(last != -1 or math.prod(rows) != math.prod(self.shape[:-1]))", "last != -1", PATCH + " -k may_not"),
    Bug("patch: any columns", PATCHING, "if not isinstance(last, slice) or last.start not in (None, 0) or last.step not in (None, 1):",
        "if not isinstance(last, slice):", PATCH + " -k may_not"),
    Bug("patch: a negative scale", PATCHING, " or not factor > 0:", ":", PATCH + " -k may_not"),
    Bug("patch: the trial ends in evaluation", PATCHING, "            module.training = True", "            pass", PATCH + " -k trace"),
    Bug("patch: a loss of something else", PATCHING, "        if not state.losses:", "        if False:", PATCH + " -k another_kind"),
    Bug("patch: dtype of the loss", PATCHING, "else loss.to(self.dtype)", "else loss", PATCH + " -k dtype_of"),
    Bug("patch: mean of the differentiable", PATCHING, ".sum().clamp(min=1) if reduction", ".numel() if reduction", PATCH + " -k differentiable"),
    Bug("patch: wrapped since", PATCHING, 'if module.__dict__.get("forward") is not ours:', "if False:", PATCH + " -k thrown"),
    Bug("patch: copies run the first", PATCHING, 'getattr(forward, "__func__", None) or', "", PATCH + " -k copy"),
    Bug("patch: a part of the head", PATCHING, 'if hasattr(self.head.weight, "full_tensor") or not self.head.weight.numel():', "if False:",
        "tests/test_patching_ranks.py -k given_back"),
    Bug("trl: rows not shifted", "cosup/integrations/trl.py", "F.pad(labels, (0, 1), value=-100)[:, 1:]", "labels", "tests/test_integrations_trl.py -k dft"),
    Bug("patch: columns that were cut off", PATCHING, "self.head.weight[: self.width], _bias(", "self.head.weight, _bias(", ARCHITECTURES + " -k inkling2"),
    Bug("patch: rows before the image's end", PATCHING, "hidden[(*rows, slice(None))]", "hidden.roll(1, 1)[(*rows, slice(None))]", ARCHITECTURES + " -k git"),
    Bug("patch: the experts' loss taken out with the logits", PATCHING, "if value is not None})", "if value is not None and name != \"aux_loss\"})",
        ARCHITECTURES + " -k mixtral"),
    Bug("patch: log-sum-exp without gradient", PATCHING, "linear_log_prob(x, w, target, **same).lse.to(", "linear_log_prob(x, w, target, **same).lse.detach().to(",
        ARCHITECTURES + " -k bamba"),
    Bug("patch: a head's bias frozen", PATCHING, "else head.bias[:width]", "else head.bias[:width].detach()", ARCHITECTURES + " -k bert"),
    Bug("patch: a trace of it after unpatch", PATCHING, "del module.__dict__[\"forward\"], module.__dict__[\"_cosup\"]", "del module.__dict__[\"forward\"]",
        ARCHITECTURES + " -k llama"),
    Bug("patch: refused, but left patched", PATCHING, "    except ValueError:\n        state.undo()\n", "    except ValueError:\n", PATCH + " -k may_not"),
    Bug("patch: logits in a list not refused", PATCHING, "next(leaf for leaf in tree_leaves((args, kwargs)) if", "next(leaf for leaf in args if",
        PATCH + " -k may_not"),
    Bug("site: fonts from elsewhere", "mkdocs.yml", "  font: false", "  font: {text: Roboto}", SITE + " -k fetches"),
    Bug("site: a public name without its entry", "docs/api.md", "::: cosup.info_nce\n", "", SITE + " -k public_name"),
    Bug("site: roles as they stand", "docs/site_hooks.py", 'ROLE.sub(r"\\1" if bare else self._link, line)', "line", SITE + " -k left_over"),
    Bug("site: links within formulas", "docs/site_hooks.py", "bare = formulas and", "bare = False and", SITE + " -k left_over"),
    Bug("site: fences with the tests' marks", "docs/site_hooks.py", 'MARKED.sub("```python", markdown)', "markdown", SITE + " -k left_over"),
    Bug("benchmarks: the slowest round", "bench/report.py", '_cell(row.get("seconds"), lambda s: f"{1e3 * min(s):.1f}")',
        '_cell(row.get("seconds"), lambda s: f"{1e3 * max(s):.1f}")', SITE + " -k of_the_results"),
]  # fmt: skip


def main() -> int:
    word = sys.argv[1] if len(sys.argv) > 1 else ""
    survivors = []
    for bug in (bug for bug in BUGS if word in bug.name):
        path = ROOT / bug.file
        source = path.read_text()
        if bug.good not in source:
            raise SystemExit(f"{bug.name}: {bug.file} no longer has the text to change")
        try:
            path.write_text(source.replace(bug.good, bug.bad))
            built = _build() if bug.build else True
            test, _, expression = bug.test.partition(" -k ")
            command = ["pytest", "-q", "-x", test, *(["-k", expression] if expression else [])]
            caught = built and _fails(command)
        finally:
            path.write_text(source)
        print("caught  " if caught else "SURVIVED", bug.name, flush=True)
        survivors += [] if caught else [bug.name]
    if any(bug.build and word in bug.name for bug in BUGS):
        _build()
    return 1 if survivors else 0


def _fails(command: list[str]) -> bool:
    """Whether a test fails, or hangs: ranks that wait for each other do."""
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(command, cwd=ROOT, start_new_session=True, **quiet) as run:
        try:
            return run.wait(LONGEST) == 1
        except subprocess.TimeoutExpired:
            os.killpg(run.pid, signal.SIGKILL)
            return True


def _build() -> bool:
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-build-isolation", "--no-deps", "-e", "."]
    return subprocess.run(command, cwd=ROOT, capture_output=True).returncode == 0


if __name__ == "__main__":
    sys.exit(main())

"""Bytes and floating-point operations of a training step, counted from shapes. Plain functions; nothing is run.

The step is that of Hugging Face's Trainer in bfloat16: weights in bfloat16, adapters and their AdamW states in float32,
products under autocast, RMSNorm in float32, PyTorch's own operations (nothing fused beyond attention and AdamW).
Symbols: B sequences of S tokens, N = B·S, N' = B·(S − 1) scored tokens, V the vocabulary, d the hidden size, r the rank
of the adapters, q and k the widths of queries and of keys, m the width of the MLP, L layers, P parameters, a those of
all adapters, R ranks. A product of [x, y] and [y, z] is 2·x·y·z operations. ``scaling_simulation`` runs the code itself
on fake tensors: that is what these counts are held against.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from balora_kernels import tiles

from balora import fused

LLAMA_3_70B: dict[str, Any] = dict(
    model_type="llama", hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64,
    num_key_value_heads=8, vocab_size=128256, max_position_embeddings=8192, rms_norm_eps=1e-5,
)  # fmt: skip
METHODS = ("full", "lora", "pissa", "published", "balora")
SKETCH = 15  # columns of the published svd_lowrank, with two power iterations
KRYLOV_STEPS = 12  # of the SVD term
KRYLOV_WIDTH = 32  # k + 10 = 20 columns, in a power of two
RANK = 10  # k


class Shape(NamedTuple):
    """A decoder with gated MLPs and RMSNorm, as the Llama and Gemma families."""

    layers: int
    d: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp: int
    vocab: int
    tied: bool = False
    norms: int = 2  # of a layer
    softcap: bool = False  # of the logits
    eager: bool = False  # attention weights in memory (a soft-cap on them), else flash attention

    @property
    def q(self) -> int:
        return self.heads * self.head_dim

    @property
    def k(self) -> int:
        return self.kv_heads * self.head_dim

    @classmethod
    def of(cls, config: dict[str, Any]) -> Shape:
        """From the fields of a transformers configuration."""
        heads, gemma = config["num_attention_heads"], config["model_type"] == "gemma2"
        return cls(
            config["num_hidden_layers"],
            config["hidden_size"],
            heads,
            config.get("num_key_value_heads") or heads,
            config.get("head_dim") or config["hidden_size"] // heads,
            config["intermediate_size"],
            config["vocab_size"],
            config.get("tie_word_embeddings", False),
            4 if gemma else 2,
            config.get("final_logit_softcapping") is not None,
            gemma,
        )


class Step(NamedTuple):
    batch: int = 4
    length: int = 512
    r: int = 128
    checkpointing: bool = True
    ranks: int = 1  # above 1: FSDP2; layers, head and the rest are units

    @property
    def tokens(self) -> int:
        return self.batch * self.length

    @property
    def scored(self) -> int:
        return self.batch * (self.length - 1)


# ---------------------------------------------------------------- parameters


def projections(shape: Shape) -> list[tuple[int, int]]:
    """(in, out) of the adapted layers of a block: q, k, v, o, gate, up, down."""
    d, m = shape.d, shape.mlp
    return [(d, shape.q), (d, shape.k), (d, shape.k), (shape.q, d), (d, m), (d, m), (m, d)]


def layer_weights(shape: Shape) -> int:
    """Those in products, of one layer."""
    return sum(i * o for i, o in projections(shape))


def parameters(shape: Shape) -> int:
    """Embedding and head (one matrix where they are tied), layers, norms."""
    embeddings = shape.vocab * shape.d * (1 if shape.tied else 2)
    return embeddings + shape.layers * (layer_weights(shape) + shape.norms * shape.d) + shape.d


def adapter_parameters(shape: Shape, r: int) -> int:
    """A [r, in] and B [out, r] of every adapted layer."""
    return shape.layers * sum(r * (i + o) for i, o in projections(shape))


# ---------------------------------------------------------------- operations


def attention_flops(shape: Shape, step: Step) -> tuple[int, int]:
    """Operations of attention in a forward and in a backward.

    4·B·S²·q a layer forward (the causal half is not taken off, as the counters of torch do it) and 2.5 times that
    backward (flash attention computes the weights again), twice without flash.
    """
    forward = 4 * shape.layers * step.batch * step.length**2 * shape.q
    return forward, 2 * forward if shape.eager else forward * 5 // 2


def flops(shape: Shape, step: Step, method: str) -> dict[str, int]:
    """Operations of products and of attention in one step, by part.

    With P the weights of all layers and t = 2·N: a forward is t·P, the gradient by the inputs of frozen layers t·P too;
    an adapter is t·a forward and 2·t·a backward (by its input, by A and B). The offset of balora adds B₀A₀: t·a forward
    and t·a backward, beside A's in one product and beside B's in one. Recomputation repeats the student's forward. The
    teacher is a forward without adapters.

    The head: logits and dH, 4·N·V·d; published also the teacher's logits, and the sketch of ``torch.svd_lowrank``: 6
    products of N'·V·15 forward, twice that backward; balora three products of N'·V·d, and for the SVD term S = HᵀH and
    H·K (K in two parts of bfloat16), 6·N'·d², and 12 Krylov steps of three [d, d] products with 32 columns. Under a
    soft-cap the logits are no linear map: they are computed twice more and there is one more dH, 6·N'·V·d, all in half
    precision like Z·Zᵀ (or ZᵀZ, the smaller one, of s = min(N', V) rows: 2·N'·V·s); its Krylov steps are one product.
    In float32 is UᵀZ of k columns alone, 2·N'·V·k; as much again is inside of a kernel, and not counted.
    """
    t, n, v, d = 2 * step.tokens, step.scored, shape.vocab, shape.d
    weights, adapters = shape.layers * layer_weights(shape), adapter_parameters(shape, step.r)
    attention, attention_backward = attention_flops(shape, step)
    head = t * v * d
    if method == "full":
        forward = t * weights + attention
        parts = {"student": forward, "backward": 2 * t * weights + attention_backward, "head and loss": 3 * head}
        # Checkpointing stops at the last tensor that is kept: only a norm behind it needs the result of down again.
        needed = forward - (t * shape.layers * shape.mlp * d if shape.norms == 2 else 0)
        return parts | {"recomputed": needed * step.checkpointing}
    paths = 2 if method == "balora" else 1  # of adapters
    forward = t * (weights + paths * adapters) + attention
    backward = t * (weights + (paths + 1) * adapters) + attention_backward
    if not step.checkpointing:  # nobody asks for the gradient by the embedding
        wide = shape.q + 2 * shape.k
        offset = t * step.r * (3 * d + wide) if method == "balora" else 0
        backward -= t * (d * wide + 3 * d * step.r) + offset
    parts = {"student": forward, "backward": backward, "recomputed": forward * step.checkpointing}
    if method in ("lora", "pissa"):
        return parts | {"head and loss": 2 * head}
    parts["teacher"] = t * weights + attention
    if method == "published":
        return parts | {"head and loss": 3 * head + 3 * 6 * 2 * n * v * SKETCH}
    parts["head and loss"] = 3 * 2 * n * v * d
    if shape.softcap:
        side = min(n, v)
        gram = 2 * n * v * side + (KRYLOV_STEPS + 1) * 2 * side**2 * KRYLOV_WIDTH
        return parts | {"SVD": 3 * 2 * n * v * d + gram + 2 * n * v * RANK}
    return parts | {"SVD": 6 * n * d**2 + (3 * KRYLOV_STEPS + 2) * 2 * d**2 * KRYLOV_WIDTH}


# ---------------------------------------------------------------- memory


def saved_by_a_layer(shape: Shape, step: Step, method: str) -> int:
    """Bytes that autograd keeps of one layer between its forward and its backward.

    RMSNorm keeps its input in float32, 4·N·d each; a trained norm keeps its result too. Layers share the bfloat16 input
    that they keep: q, k, v one of 2·N·d, gate and up another; o has the output of flash attention, without flash one of
    its own, 2·N·q; down 2·N·m. Not so in peft: it hands the adapter its input in the adapter's float32 and autocast
    rounds it again, a copy of 2·N·in for every layer, unless FSDP2 has gathered the adapters in bfloat16. The product
    with A is 2·N·r. Attention: q, its output, k, v and the log-sum-exps; without flash q, the weights three times
    (4 + 2 + 2 bytes), and k and v repeated for every head. The MLP keeps gate, act(gate) and up.
    """
    n, d, q, k, m = step.tokens, shape.d, shape.q, shape.k, shape.mlp
    norms = shape.norms * (6 if method == "full" else 4) * n * d
    inputs = sum(i for i, _ in projections(shape)) if casts(step, method) else 2 * d + m + q * shape.eager
    adapters = 0 if method == "full" else len(projections(shape)) * step.r
    if shape.eager:
        attention = 3 * 2 * n * q + 8 * step.batch * shape.heads * step.length**2
    else:
        attention = 2 * n * (2 * q + 2 * k) + 4 * n * shape.heads
    return norms + 2 * n * (inputs + adapters) + attention + 2 * n * 3 * m


def casts(step: Step, method: str) -> bool:
    """Whether the adapters' input, A and B are rounded from float32, as peft and autocast do it on one rank."""
    return step.ranks == 1 and method not in ("full", "balora")


def layer_backward(shape: Shape, step: Step, method: str) -> int:
    """Bytes that are alive for a moment in the backward of a layer.

    The gradient by the input of down, in bfloat16 twice, 4·N·m, and sums of gradients by the layer's input, 4·N·d; with
    an adapter's float32 8·N·m and 12·N·d.
    """
    return step.tokens * (8 * shape.mlp + 12 * shape.d if casts(step, method) else 4 * shape.mlp + 4 * shape.d)


def loss_tensors(shape: Shape, step: Step, method: str) -> dict[str, int]:
    """Bytes of the head and the loss at their peak, beyond the last hidden states.

    PiSSA (the backward of the cross-entropy): log-softmax, the gradient by it and that by the logits, float32, 12·N·V;
    a soft-cap keeps its tanh, 2·N·V. Published (the forward of the KL): the teacher's logits in bfloat16 and, in
    float32, the model's logits as accelerate returns them and the log-softmax of the cross-entropy, 10·N·V; of scored
    rows both logits, log-softmax of the one, softmax of the other, and the three products of ``kl_div``, 28·N'·V.
    balora: one chunk's logits in float32 and their difference in bfloat16, in place of which the gradient is written,
    and dH of the chunk in slices; K in two parts, 4·d². Under a soft-cap a tile of Z and its gradient instead, the sum
    of dH over tiles and Z·Zᵀ, where that is more.
    """
    n, scored, v, d = step.tokens, step.scored, shape.vocab, shape.d
    if method != "balora" and method != "published":
        return {"[N, V] tensors": (14 if shape.softcap else 12) * n * v}
    if method == "published":
        return {"[N, V] tensors": (12 if shape.softcap else 10) * n * v + 28 * scored * v}
    rows = tiles.chunk_rows(scored, tiles.row_stride(v) * 6, fused.CHUNK_BYTES)
    chunk = 6 * rows * tiles.row_stride(v) + _times_weight(rows, d, v)
    if not shape.softcap:
        return {"loss chunk": chunk, "K": 4 * d**2}
    side = min(scored, v)
    columns = tiles.chunk_rows(max(scored, v), side * 6, fused.CHUNK_BYTES)
    tile = 6 * side * tiles.row_stride(columns) + 4 * scored * d + 4 * side**2
    tile += _times_weight(scored, d, columns) if v > scored else _times_weight(columns, d, v)
    return {"loss chunk": max(chunk, tile)}


def _times_weight(rows: int, d: int, v: int) -> int:
    """Bytes of rows of hidden states and of their gradient, in slices of the vocabulary and summed."""
    slices = tiles.vocabulary_slices(rows, d, v)
    return rows * d * (2 + 4 + 4 * slices + (4 if slices > 1 else 0))


class Memory(NamedTuple):
    """Bytes by part at the two moments that can be the peak, and what is there all the time."""

    always: dict[str, int]
    loss: dict[str, int]
    backward: dict[str, int]

    @property
    def peak(self) -> int:
        return sum(self.parts.values())

    @property
    def parts(self) -> dict[str, int]:
        at = max(self.loss, self.backward, key=lambda parts: sum(parts.values()))
        return {**self.always, **at}


def memory(shape: Shape, step: Step, method: str) -> Memory:
    """Peak bytes of a rank, by part.

    Full fine-tuning: weights, gradients and both AdamW states in bfloat16, 8·P. Adapters in float32 with gradients and
    states, 16·a. balora: A₀, B₀ in bfloat16, 2·a; G and its factor, 8·d², whole in every rank. With checkpointing a
    layer keeps its input, 2·N·d, and one layer at a time is computed again. FSDP2 holds a share 1/R of weights,
    adapters, gradients and states; gathered are the embedding (from the first forward to the end of the backward), the
    head, and in the backward a layer and the buffer of the next one.
    """
    n, d, v, layers, ranks = step.tokens, shape.d, shape.vocab, shape.layers, step.ranks
    p, a = parameters(shape), adapter_parameters(shape, step.r)
    full = method == "full"
    trained = {"weights": 2 * p // ranks}
    if full:
        trained |= {"AdamW states": 4 * p // ranks}
    else:
        trained |= {"adapters": 4 * a // ranks, "AdamW states": 8 * a // ranks}
    if method == "published":
        trained["second model"] = 2 * p // ranks
    if method == "balora":
        trained["A0, B0"] = 2 * a // ranks
        trained["Gram matrix and factor"] = 0 if shape.softcap else 8 * d**2

    layer = saved_by_a_layer(shape, step, method)
    copies = 2 * a if casts(step, method) else 0  # of the adapters in bfloat16, by autocast
    gradients = (2 * p if full else 4 * a) // ranks
    inputs = 2 * n * d  # of a layer
    moving = layer + layer_backward(shape, step, method)
    if step.checkpointing:
        kept = layers * inputs + 2 * inputs
        # From the last layer to the first one, inputs go and gradients come.
        first, last = moving + layers * inputs, moving + inputs
    else:
        kept = layers * layer + copies
        first, last = kept + moving - layer, moving + copies
    if full:  # the embedding's gradient comes when all activations are gone
        first, last = first + 2 * v * d, max(last + gradients - 2 * v * d, gradients)
    else:
        last += gradients * (layers - 1) // layers
    backward = {"activations and gradients": max(first, last)}
    loss = {"activations": kept, "hidden states": (6 if method == "balora" else 2) * n * d}
    loss |= loss_tensors(shape, step, method)
    if ranks > 1:
        unit = 2 * layer_weights(shape) + (6 if method == "balora" else 2) * a // layers
        held = {"gathered embedding": 2 * v * d * (2 if method == "published" else 1)}
        # FSDP2 keeps the buffer of a gather beside the weights until the next unit is gathered.
        loss |= held | {"gathered head": 2 * v * d * {"balora": 2, "published": 0}.get(method, 1)}
        backward |= held | {"gathered layers": 2 * unit}
    return Memory(trained, loss, backward)


# ---------------------------------------------------------------- communication


def gathered(shape: Shape, step: Step, method: str) -> int:
    """Bytes of a step's all-gathers, as every rank holds them afterwards (of which it receives (R − 1)/R).

    Every layer, with its adapters in bfloat16 (balora: in float32, and A₀, B₀), is gathered for the forward and again
    for the backward (in which a checkpointed layer is also recomputed); the head likewise; the embedding once. The
    teacher of balora is one more forward through the same layers, adapters and all; it needs no head; and one layer is
    prefetched in vain. The published second model is gathered once, its head too; its embedding stays.
    """
    base, unit = _units(shape, step, method)
    matrix = 2 * shape.vocab * shape.d
    total = 2 * shape.layers * unit + 3 * matrix
    if method == "balora":
        total += gathered_by_teacher(shape, step)
    if method == "published":
        total += shape.layers * base + matrix
    return total


def gathered_by_teacher(shape: Shape, step: Step) -> int:
    """The part of balora's that its teacher's forward is the reason of."""
    return (shape.layers + 1) * _units(shape, step, "balora")[1]


def _units(shape: Shape, step: Step, method: str) -> tuple[int, int]:
    """Bytes of a layer's gather, without its adapters and with them."""
    base = 2 * (layer_weights(shape) + shape.norms * shape.d)
    return base, base + (6 if method == "balora" else 2) * adapter_parameters(shape, step.r) // shape.layers


def scattered(shape: Shape, step: Step) -> int:
    """Bytes of the adapters' gradients, which a step reduces in float32."""
    return 4 * adapter_parameters(shape, step.r)

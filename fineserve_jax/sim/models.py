"""Models nobody needs to load: their shapes, what a step of them costs, and how long their KV pages are.

Shapes are those of the `config.json` that each model is published with. A *variant* is a shape with a
precision of its weights, written `llama-3.1-8b@awq`; the same shape in two precisions is two models.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from fineserve_jax.errors import ConfigError
from fineserve_jax.kv.classes import PageClass
from fineserve_jax.pallas_kernels.format_sizes import FormatSizes, get_format_sizes
from fineserve_jax.pallas_kernels.geometry import PageGeometry
from fineserve_jax.scheduler.costs import FormatCost, ModelCost, dense_layer_parameters, pair_flops
from fineserve_jax.scheduler.devices import DeviceRoofline, DeviceSpec
from fineserve_jax.sim.efficiency import Efficiency

UNIT_BYTES = 256
UNIT_WORDS = UNIT_BYTES // 2


@dataclass(frozen=True, slots=True)
class ModelShape:
    """Architecture of a dense decoder-only transformer; fields as in `models.ModelConfig`."""

    name: str
    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    tie_embeddings: bool = False

    @property
    def layer_parameters(self) -> int:
        """Parameters of the matrices of all layers."""
        sizes = self.hidden_size, self.num_heads, self.num_kv_heads, self.head_dim, self.intermediate_size
        return self.num_layers * dense_layer_parameters(*sizes)

    def page_geometry(self, page_size: int) -> PageGeometry:
        """How pages of so many tokens lie in the arena."""
        return PageGeometry(self.num_layers, self.num_kv_heads, self.head_dim, page_size, UNIT_WORDS)


SHAPES = {
    shape.name: shape
    for shape in (
        ModelShape("smollm2-135m", 30, 576, 9, 3, 64, 1536, 49152, True),
        ModelShape("llama-3-8b", 32, 4096, 32, 8, 128, 14336, 128256),
        ModelShape("llama-3.1-8b", 32, 4096, 32, 8, 128, 14336, 128256),
        ModelShape("llama-3.1-70b", 80, 8192, 64, 8, 128, 28672, 128256),
        ModelShape("qwen-3-32b", 64, 5120, 64, 8, 128, 25600, 151936),
    )
}


@dataclass(frozen=True, slots=True)
class WeightCost:
    """Bits a weight with its scales, and which products it is multiplied in: `wide`, `narrow` or `dequantise`."""

    bits: float
    products: str


# 4-bit weights in groups of 128 with a 16-bit scale and a 4-bit zero point: 4 + 20/128 bits.
WEIGHTS = {
    "bf16": WeightCost(16.0, "wide"),
    "fp8": WeightCost(8.0, "narrow"),
    "int8": WeightCost(8.0, "narrow"),
    "awq": WeightCost(4.16, "dequantise"),
    "qoq": WeightCost(4.16, "narrow"),
}


@dataclass(frozen=True, slots=True)
class ModelVariant:
    """A model as a device serves it.

    Attributes:
        shape: its architecture.
        weights: a key of `WEIGHTS`.
        tp: devices that share each of its layers.
    """

    shape: ModelShape
    weights: str = "bf16"
    tp: int = 1

    @property
    def name(self) -> str:
        return f"{self.shape.name}@{self.weights}"

    @property
    def weight_bytes(self) -> float:
        """All weights, on all devices of the group; embeddings stay in 16 bits."""
        shape = self.shape
        embeddings = shape.vocab_size * shape.hidden_size
        copies = 1 if shape.tie_embeddings else 2
        return shape.layer_parameters * WEIGHTS[self.weights].bits / 8 + copies * embeddings * 2.0

    @property
    def step_bytes(self) -> float:
        """Weights that a step reads: all but the table of input embeddings, unless it is the output head, too."""
        embeddings = 0 if self.shape.tie_embeddings else self.shape.vocab_size * self.shape.hidden_size
        return self.weight_bytes - 2.0 * embeddings

    def cost(self, kv_formats: Iterable[str], page_size: int) -> ModelCost:
        """What a step costs, for the scheduler and for the cost model alike."""
        shape = self.shape
        formats = {}
        for name in kv_formats:
            words = shape.num_layers * get_cache(name).words_per_layer(shape.page_geometry(page_size))
            values = 2 * shape.num_layers * shape.num_kv_heads * shape.head_dim * page_size
            formats[name] = FormatCost(bits=16 * words / values, bytes_per_token=2 * words / page_size)
        return ModelCost(
            flops_per_token=2.0 * shape.layer_parameters,
            flops_per_pair=float(pair_flops(shape.num_layers, shape.num_heads, shape.head_dim)),
            weight_bytes=self.step_bytes,
            formats=formats,
        )

    def roofline(self, device: DeviceSpec, efficiency: Efficiency) -> DeviceRoofline:
        """The device group as this model sees it: its kind of products, and the all-reduces of its layers."""
        kind = WEIGHTS[self.weights].products
        reached = {
            "wide": efficiency.flops * device.flops,
            "narrow": efficiency.narrow_flops * device.narrow_flops,
            "dequantise": efficiency.dequantise * device.flops,
        }[kind]
        bandwidth = efficiency.bandwidth * device.bandwidth * self.tp
        reduces = 2 * self.shape.num_layers if self.tp > 1 else 0
        launches = self.shape.num_layers * efficiency.layer_overhead_s
        # A launched kernel runs while the next is launched: the slower of the two counts.
        waiting = max(0.0, launches - self.step_bytes / bandwidth)
        flops = 1 / (1 / (reached * self.tp) + self._reduce_seconds_per_flop(device))
        return DeviceRoofline(flops, bandwidth, efficiency.step_overhead_s + waiting + reduces * efficiency.reduce_s)

    def _reduce_seconds_per_flop(self, device: DeviceSpec) -> float:
        """Seconds that the activations' way through the links adds to an operation."""
        if self.tp == 1:
            return 0.0
        ring = 2 * (self.tp - 1) / self.tp
        token_bytes = 2 * self.shape.num_layers * ring * 2.0 * self.shape.hidden_size
        return token_bytes / device.link_bandwidth / (2.0 * self.shape.layer_parameters)


def parse_model(text: str, tp: int = 1) -> ModelVariant:
    """`llama-3.1-8b@awq` as a variant; without `@` its weights are bf16.

    Raises:
        ConfigError: a shape or weight format that is not known.
    """
    name, _, weights = text.partition("@")
    weights = weights or "bf16"
    if name not in SHAPES:
        raise ConfigError(f"model {name!r} has no known shape; choose one of {', '.join(SHAPES)}")
    if weights not in WEIGHTS:
        raise ConfigError(f"weights {weights!r} of {text!r} are not known; choose one of {', '.join(WEIGHTS)}")
    return ModelVariant(SHAPES[name], weights, tp)


def get_cache(name: str) -> FormatSizes:
    """The KV format of that name, built in or registered; raises ConfigError if there is none."""
    try:
        return get_format_sizes(name)
    except ValueError as error:
        raise ConfigError(str(error)) from None


def page_classes(
    kv_formats: Mapping[ModelVariant, Iterable[str]], page_size: int, *, bare: bool = False
) -> dict[tuple[str, str], PageClass]:
    """The page class of each model and KV format, and of the residuals they need.

    Args:
        bare: pages hold values only, without scales and residuals, so that their lengths are as their bits.
    """
    classes: dict[tuple[str, str], PageClass] = {}

    def add(model: ModelVariant, name: str) -> PageClass:
        key = (model.name, name)
        if key not in classes:
            sizes, geometry = get_cache(name), model.shape.page_geometry(page_size)
            words = (sizes.bare_words_per_layer if bare else sizes.words_per_layer)(geometry)
            classes[key] = PageClass(
                model=model.name,
                kv_format=name,
                page_units=model.shape.num_layers * -(-words // UNIT_WORDS),
                page_size=page_size,
                page_bytes=2 * model.shape.num_layers * words,
                residual=None if bare or sizes.residual is None else add(model, sizes.residual),
            )
        return classes[key]

    for model, names in kv_formats.items():
        for name in names:
            add(model, name)
    return classes

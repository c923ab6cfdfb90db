"""The `moe` section of a configuration: every key, its unit and its default stand here once."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from himoe.config.kinds import STRICT, Count, CountOrZero, entry_of
from himoe.config.rules import fill_in


class ScheduleEntry(BaseModel):
    """How a balancer's losses, or the moves of its state, change over the steps: the options of `himoe.Schedule`."""

    model_config = STRICT

    kind: Literal["warmup", "two_stage", "off_after"]
    steps: Count
    scales: Literal["losses", "moves"] | None = None


class BalancerEntry(BaseModel):
    """One balancer by name; every further key is an option of its constructor."""

    model_config = ConfigDict(strict=True, extra="allow", frozen=True)

    name: Annotated[str, entry_of("balancers")]
    schedule: ScheduleEntry | None = None
    per_group: bool = False

    @property
    def options(self) -> dict[str, Any]:
        """Return the keys beside `name`."""
        return dict(self.model_extra or {})


class PoolEntry(BaseModel):
    """Some experts of one kind and size."""

    model_config = STRICT

    num_experts: Count
    expert_dim: Count | None = None
    experts: Annotated[str, entry_of("experts")] | None = None


class MoEConfig(BaseModel):
    """The mixture-of-experts layers: which they are, their size, and how tokens find experts."""

    model_config = STRICT

    every: CountOrZero = Field(
        default=1, description="Layer i has experts if (i + 1) is a multiple of this. 0: no layer has"
    )
    layers: list[int] | None = Field(
        default=None, description="Indices of the layers that have experts, from 0; replaces `moe.every`"
    )
    num_experts: Count = Field(description="Routed experts of a layer, E")
    num_groups: Count = Field(
        default=1, description="Groups of experts, G; equal and contiguous unless `moe.groups` is given"
    )
    groups: list[Annotated[list[int], Field(min_length=1)]] | None = Field(
        default=None,
        description="The experts of each group, where groups are unequal; every expert stands in exactly one",
    )
    top_k: Count = Field(description="Experts of each token, K, over all groups")
    top_k_per_group: list[Count] | None = Field(
        default=None, description="Experts of each token in each group, where they differ; they sum to `moe.top_k`"
    )
    expert_dim: Count = Field(description="Hidden width of one routed expert, F")
    shared_dim: CountOrZero = Field(
        default=0,
        description="Hidden width of the shared expert that every token passes, of the kind of `moe.experts` where "
        "`model.ffn` has that too, else swiglu. 0: none",
    )
    shared_gate: bool = Field(
        default=False, description="Weigh the shared expert of each token by a sigmoid that is learned"
    )
    experts: Annotated[str, entry_of("experts")] = Field(
        default="swiglu", description="Kind of expert (`himoe list experts`)"
    )
    pools: list[PoolEntry] | None = Field(
        default=None,
        min_length=1,
        description="Experts of several kinds or sizes in one layer, in order of their numbers, each a table "
        "`{ num_experts, expert_dim, experts }`; what it leaves out is as above",
    )
    preset: Annotated[str, entry_of("presets")] | None = Field(
        default="hi_moe",
        description="Router and balancing of one paper (`himoe list presets`). None, and the default once "
        "`moe.selector` is given: spelled out by selector, score and balancers",
    )
    options: dict[str, Any] = Field(
        default_factory=dict, description="Options of the preset (`himoe list presets NAME`)"
    )
    gate: Annotated[str, entry_of("gates")] | None = Field(
        default=None,
        description="How a token becomes logits (`himoe list gates`), beside a selector. None: linear",
    )
    gate_options: dict[str, Any] = Field(default_factory=dict, description="Options of the gate")
    selector: Annotated[str, entry_of("selectors")] | None = Field(
        default=None, description="How experts are chosen from scores (`himoe list selectors`), in place of a preset"
    )
    selector_options: dict[str, Any] = Field(default_factory=dict, description="Options of the selector")
    score: Annotated[str, entry_of("scores")] | None = Field(
        default=None, description="How logits become scores (`himoe list scores`), beside a selector. None: softmax"
    )
    balancers: list[BalancerEntry] = Field(
        default_factory=list,
        description="Balancing strategies, each a table with `name` (`himoe list balancers`) and its options; "
        "`schedule = { kind, steps, scales }` changes its losses, or else the moves of its state, over the steps, "
        "`per_group = true` keeps one for each group; "
        "beside a preset they join its own",
    )
    renormalize: bool | None = Field(
        default=None,
        description="Divide the weights of a token's experts by their sum. None: as preset, score or selector "
        "were published, else true where `moe.top_k` is above 1, since a single weight would always be 1",
    )
    capacity_factor: float | None = Field(
        default=None,
        gt=0,
        description="Places of an expert, in multiples of its fair share; pairs beyond are dropped. None: no limit",
    )
    capacity_order: Literal["token_major", "column_major", "score", "batch_prioritised"] = Field(
        default="token_major",
        description="Who takes an expert's places first: token by token; all first choices before all second ones; "
        "the pairs of largest weight; or the tokens of largest weight. Only the first is causal",
    )
    backend: Literal["auto", "loop", "grouped", "native", "triton"] = Field(
        default="auto",
        description="How the experts are computed; `triton` also fuses the router where its kernel covers it",
    )
    force: bool = Field(default=False, description="Train although a guard refuses the combination")
    allow_non_causal: bool = Field(
        default=False, description="Train although later tokens can change the routing of earlier ones"
    )

    @model_validator(mode="before")
    @classmethod
    def _fill_in(cls, data: Any) -> Any:
        return fill_in(data)

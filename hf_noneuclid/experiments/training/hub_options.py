"""What the recipes add to the Trainer's own options of the Hub."""

from dataclasses import dataclass, field

from hf_noneuclid.experiments.secrets import keep_token


@dataclass
class HubArguments:
    """Beside --push_to_hub, --hub_model_id, --hub_strategy, --hub_private_repo, --hub_revision."""

    overwrite_hub_model: bool = field(
        default=False, metadata={"help": "Replace another model that the repository on the Hub holds."}
    )
    hub_license: str | None = field(
        default=None, metadata={"help": "Licence of the weights for the model card: apache-2.0, mit, ..."}
    )
    data_license: str | None = field(
        default=None, metadata={"help": "Licence of the data for the model card, where it is not known."}
    )

    def __post_init__(self) -> None:
        keep_token(self)
        super().__post_init__()

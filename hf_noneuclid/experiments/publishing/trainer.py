"""The Trainer's pushes while it trains, and what it leaves to us."""

import math
from pathlib import Path
from typing import Any

from hf_noneuclid.experiments.publishing.hub import Repository, connect, create, write_origin


class HubTrainerMixin:
    """Pushes checkpoints as --hub_strategy says unless they diverged, and no card of the Trainer's own.

    The results are pushed by `publishing.model.push`, after they are written.
    """

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Make the repository, and the branch of --hub_revision, which the Trainer expects to be there."""
        if self.is_world_process_zero():
            args = self.args
            name = args.hub_model_id or Path(args.output_dir).absolute().name
            create(connect(), Repository(name, private=args.hub_private_repo, revision=args.hub_revision))
            self.hub_model_id, self.push_in_progress = name, None

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the model; the Trainer would push it with a card that knows no results yet."""
        super().save_model(output_dir, _internal_call=True)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> Any:
        if not self.is_world_process_zero() or not self._is_sound():
            return None
        write_origin(Path(self.args.output_dir))
        return super()._push_from_checkpoint(checkpoint_folder)

    def _is_sound(self) -> bool:
        """Say whether the losses logged last are finite: the weights of a diverged run are worth nothing."""
        last = {name: value for row in self.state.log_history for name, value in row.items()}
        return all(math.isfinite(last.get(name, 0.0)) for name in ("loss", "eval_loss"))

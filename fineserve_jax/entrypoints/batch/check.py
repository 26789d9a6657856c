"""`--check`: says of every row whether it can be answered, without answering any and without the models' weights."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fineserve_jax.engine.engine_config import EngineConfig
from fineserve_jax.engine.request_checker import RequestChecker
from fineserve_jax.entrypoints.batch.inputs import Inputs
from fineserve_jax.entrypoints.batch.journal import Journal
from fineserve_jax.entrypoints.batch.requests import RowRequests
from fineserve_jax.entrypoints.batch.row_ids import id_key
from fineserve_jax.entrypoints.batch.rows import BadRow, BatchRow, read_rows, unforeseen
from fineserve_jax.errors import RequestError
from fineserve_jax.validation import shown


@dataclass(frozen=True, slots=True)
class Finding:
    """What is wrong with a row of an input."""

    path: str
    line: int
    error: str
    code: str


class BatchCheck:
    """Checks all rows of inputs, as `run_batch` would.

    Args:
        model, source, config, sampling: see `run_batch`. Of models, configurations and tokenizers are read.

    Raises:
        ConfigError, RequestError, ModelLoadError: see `run_batch`.

    Attributes:
        num_rows, num_prompt_tokens: of the rows so far, and of the prompts of the good ones among them.
    """

    def __init__(
        self,
        model: str | Path | Mapping[str, Any],
        source: str | Path | Sequence[str | Path],
        config: EngineConfig | None = None,
        sampling: Mapping[str, Any] | None = None,
    ) -> None:
        self._inputs = Inputs(source)
        config = config or EngineConfig()
        self._requests = RowRequests(sampling, config.seed)
        self._checker = RequestChecker(model, config)
        self.num_rows, self.num_prompt_tokens = 0, 0

    def findings(self) -> Iterator[Finding]:
        """What is wrong, in the order of the rows."""
        names = self._inputs.names
        ids = Journal(None)
        try:
            for row in read_rows(self._inputs, names, self._inputs.openai):
                self.num_rows += 1
                found = (row.error, row.code) if isinstance(row, BadRow) else self._of_row(row, ids)
                if found is not None:
                    yield Finding(names[row.file], row.line, *found)
        finally:
            ids.close()

    def _of_row(self, row: BatchRow, ids: Journal) -> tuple[str, str] | None:
        if ids.claim(id_key(row.id), row.seq) is not None:
            return f"id {shown(row.id)} is that of another row; give every row an id of its own", "duplicate_id"
        try:
            served = self._checker.served(row.options.model)
            request = self._requests.request(row, served.tokenizer, served.max_seq_len)
            self._checker.check(*request)
        except RequestError as error:
            return str(error), "invalid_request"
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # a panic of the tokenizer's Rust code is no Exception
            return unforeseen(error), "internal_error"
        self.num_prompt_tokens += len(request.token_ids)
        return None

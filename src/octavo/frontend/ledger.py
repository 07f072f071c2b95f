"""The ledger: every live request with all that is needed to continue it on another engine."""

import secrets
import time
import uuid
from collections.abc import Callable, Iterable
from contextlib import suppress

import msgspec

from octavo.engine.messages import EngineInfo, EngineRequest, TokenOutput
from octavo.errors import InvalidRequest, OctavoError, PromptTooLong, RequestFailed, RequestTimeout
from octavo.outputs import RequestMetrics, RequestOutput
from octavo.params import SamplingParams
from octavo.states import KVState, StateBook
from octavo.text import Detokenizer, Tokenizer
from octavo.text.stop_strings import StopStrings

from .live import LiveCompletion, LiveRequest
from .prompts import Ask

Sink = Callable[[LiveRequest, RequestOutput | Exception], None]

_FAILURES: dict[str | None, type[OctavoError]] = {"error": RequestFailed, "timeout": RequestTimeout}


class Ledger:
    """Opens requests, hands their tokens to whom they belong, and knows what is still owed. Not thread-safe."""

    def __init__(self, tokenizer: Tokenizer, info: EngineInfo, states: StateBook):
        self._tokenizer = tokenizer
        self._info = info
        self._states = states
        self._live: dict[str, LiveRequest] = {}
        self._completions: dict[str, tuple[LiveRequest, LiveCompletion]] = {}  # by the engine's id
        self.timed_out = 0  # requests, since the start

    def __len__(self) -> int:
        return len(self._live)

    @property
    def num_completions(self) -> int:
        return len(self._completions)

    def open(
        self, asks: list[Ask], sink: Sink, request_id: str | None = None
    ) -> tuple[list[LiveRequest], list[EngineRequest]]:
        """New requests, and what to ask of the engine for them: all or none.

        Raises InvalidRequest, PromptTooLong, InvalidKVState.
        """
        lives: list[LiveRequest] = []
        try:
            for ask in asks:
                lives.append(self._open(ask, sink, request_id))
        except BaseException:
            for live in lives:
                self.close(live.id)
            raise
        return lives, [completion.request for live in lives for completion in live.completions]

    def _open(self, ask: Ask, sink: Sink, request_id: str | None) -> LiveRequest:
        prompt, params, terms, state = ask
        arrival = time.time()
        id = request_id or f"req-{uuid.uuid4().hex}"
        if id in self._live:
            raise InvalidRequest(f"a request with the id {id!r} is running", "request_id")
        tokens = self._tokens(ask)
        self._check_tokens(params)
        room = self._info.max_model_len - len(tokens)
        seed = secrets.randbits(53) if params.seed is None else params.seed % 2**64
        live = LiveRequest(
            id=id,
            prompt=prompt if isinstance(prompt, str) else None,
            prompt_token_ids=tokens,
            params=params,
            seed=seed,
            tokenizer=self._tokenizer,
            sink=sink,
            completions=[],
            metrics=RequestMetrics(arrival_time=arrival),
            state=state,
        )
        for index in range(params.n):
            request = EngineRequest(
                id=id if params.n == 1 else f"{id}#{index}",
                prompt=tokens,
                params=msgspec.structs.replace(
                    params,
                    n=1,
                    stop=None,
                    seed=(seed + index) % 2**64,
                    max_tokens=min(params.max_tokens or room, room),
                    min_tokens=min(params.min_tokens, room),
                ),
                arrival=arrival,
                eos=[] if params.ignore_eos else sorted(self._tokenizer.eos_token_ids),
                after=f"{id}#0" if index else None,
                tenant=terms.tenant,
                salt=terms.cache_salt or "",
                priority=terms.priority,
                ttft_target=terms.ttft_target,
                timeout=terms.timeout,
            )
            stops = StopStrings(params.stop_strings)
            live.completions.append(LiveCompletion(request, index, Detokenizer(self._tokenizer), stops))
        self._live[id] = live
        self._completions.update({c.request.id: (live, c) for c in live.completions})
        return live

    def deliver(self, outputs: Iterable[TokenOutput]) -> list[str]:
        """Pass tokens on to the sinks. The engine ids that a stop string ended, to be aborted there."""
        stopped = []
        for output in outputs:
            live, completion = self._completions.get(output.id, (None, None))
            if live is None or completion is None:
                continue  # aborted meanwhile
            if failure := _FAILURES.get(output.finish_reason):
                stopped += self.close(live.id)
                self.timed_out += failure is RequestTimeout
                live.sink(live, failure(output.message or "the engine could not go on with this request"))
                continue
            increment = live.advance(completion, output)
            if completion.finish_reason:
                del self._completions[output.id]
                if not output.finish_reason:
                    stopped.append(output.id)
            if increment.finished:
                del self._live[live.id]
                self._states.remember(
                    live.id,
                    live.completions[0].request.tenant,
                    live.completions[0].request.salt,
                    live.prompt_token_ids,
                    [completion.token_ids for completion in live.completions],
                    live.state,
                )
            live.sink(live, increment)
        return stopped

    def close(self, id: str, say_so: bool = False) -> list[str]:
        """Forget a request, its user being gone. The engine ids to be aborted; none if it is not live.

        `say_so`: its sink gets a last increment with finish_reason "abort".
        """
        live = self._live.pop(id, None)
        if live is None:
            return []
        unfinished = [completion for completion in live.completions if not completion.finish_reason]
        for completion in unfinished:
            del self._completions[completion.request.id]
        if say_so:
            live.sink(live, live.abort())
        return [completion.request.id for completion in unfinished]

    def fail(self, error: Exception) -> None:
        """Nobody will continue the live requests: tell their sinks."""
        lives = list(self._live.values())
        self._live.clear()
        self._completions.clear()
        for live in lives:
            with suppress(Exception):  # a sink that fails keeps no other from hearing of it
                live.sink(live, error)

    def owed(self) -> list[EngineRequest]:
        """What to ask of a new engine so that every live request goes on where it was."""
        return [
            msgspec.structs.replace(completion.request, output=list(completion.token_ids))
            for _, completion in self._completions.values()
        ]

    def keep_state(self, request_id: str, index: int) -> KVState:
        """A state of a finished request. Raises InvalidRequest, QuotaExceeded."""
        if request_id in self._live:
            raise InvalidRequest(f"the request {request_id!r} still runs: it has no state before its end", "request_id")
        return self._states.keep(request_id, index)

    def _tokens(self, ask: Ask) -> list[int]:
        prompt, state = ask.prompt, ask.state
        if isinstance(prompt, str):
            tokens = self._tokenizer.encode(prompt, add_special_tokens=state is None)
        else:
            tokens = list(prompt)
            size = self._info.vocab_size
            if not all(isinstance(token, int) and 0 <= token < size for token in tokens):
                raise InvalidRequest(f"prompt token ids must be integers from 0 to {size - 1}", "prompt")
        if state is not None:
            tokens = self._states.use(state, ask.terms.tenant, ask.terms.cache_salt or "") + tokens
        if not tokens:
            raise InvalidRequest("the prompt is empty", "prompt")
        limit = self._info.max_model_len
        if len(tokens) >= limit:
            raise PromptTooLong(
                f"the prompt has {len(tokens)} tokens; the model's context of {limit} has room for at most {limit - 1}",
                "prompt",
            )
        return tokens

    def _check_tokens(self, params: SamplingParams) -> None:
        size = self._info.vocab_size
        for param, tokens in (("stop_token_ids", params.stop_token_ids), ("logit_bias", params.logit_bias)):
            if any(token >= size for token in tokens or ()):
                raise InvalidRequest(f"{param} names tokens beyond the vocabulary of {size}", param)

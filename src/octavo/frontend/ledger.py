"""Ledger: every live request, with all that is needed to continue it on another engine."""

import itertools
import secrets
import time
import uuid
from collections import Counter
from collections.abc import Iterator

import msgspec

from octavo.engine.deadlines import Deadlines
from octavo.engine.messages import EngineInfo, EngineRequest
from octavo.errors import InvalidRequest
from octavo.outputs import RequestMetrics
from octavo.params import RequestOutputKind, SamplingParams
from octavo.text import Detokenizer, Tokenizer
from octavo.text.stop_strings import StopStrings

from .live import LiveCompletion, LiveRequest, Sink
from .repetition import RepetitionDetector
from .requests import Request, banned_tokens, check_id, max_output
from .thinking import thinking_of

SEED_BITS = 53  # JavaScript, and JSON parsers with its numbers, keep integers exact up to 53 bits


class Ledger:
    """The live requests by request id, their completions by the engine's ids, and their deadlines. Not thread-safe.

    Args:
        request_timeout: timeout in seconds of requests that set none; None for no limit.
        reasoning_parser, max_new_tokens: the settings of these names.
        is_traced: whether engines report what happens to requests.
        is_alone: whether no other frontend uses the engines, so that the engine's ids need not be unique among several.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        info: EngineInfo,
        request_timeout: float | None,
        reasoning_parser: str = "none",
        max_new_tokens: int | None = None,
        is_traced: bool = False,
        is_alone: bool = True,
    ):
        self._tokenizer, self._info, self._request_timeout = tokenizer, info, request_timeout
        self._max_new_tokens = max_new_tokens
        self.tenant_weights: dict[str, float] = {}  # those that the engines' settings do not have
        self._reasoning_parser, self.is_traced = reasoning_parser, is_traced
        self._eos = sorted(tokenizer.eos_token_ids)
        self._live: dict[str, LiveRequest] = {}
        self._completions: dict[str, tuple[LiveRequest, LiveCompletion]] = {}  # by the engine's id
        numbers, prefix = itertools.count(), "" if is_alone else f"{secrets.token_hex(6)}-"
        self._engine_ids = (f"{prefix}{number}" for number in numbers)
        self._deadlines = Deadlines()  # in time.monotonic()

    def __len__(self) -> int:
        return len(self._live)

    def __iter__(self) -> Iterator[LiveRequest]:
        return iter(list(self._live.values()))

    def __contains__(self, id: str) -> bool:
        return id in self._live

    @property
    def num_completions(self) -> int:
        """Return the number of unfinished completions."""
        return len(self._completions)

    def count_tenants(self) -> Counter[str]:
        """Return the number of unfinished completions by tenant."""
        return Counter(completion.request.tenant for _, completion in self._completions.values())

    def find(self, engine_id: str) -> tuple[LiveRequest, LiveCompletion] | None:
        """Return the unfinished completion with the engine's id `engine_id`, and its request."""
        return self._completions.get(engine_id)

    def open(self, request: Request, tokens: list[int], sink: Sink, id: str | None = None) -> LiveRequest:
        """Add a request and return it. Raises InvalidRequest.

        Args:
            tokens: the whole prompt, including the tokens of its KV state.
        """
        if id is not None:
            check_id(id)
        live = self._live_request(request, tokens, sink, id or f"req-{uuid.uuid4().hex}")
        if live.id in self._live:
            raise InvalidRequest(f"a request with the id {live.id!r} is running", "request_id")
        self._live[live.id] = live
        self._completions.update({completion.request.id: (live, completion) for completion in live.completions})
        if live.timeout is not None:
            self._deadlines.set(live.id, live.arrival + live.timeout)
        return live

    def finish(self, completion: LiveCompletion) -> None:
        """Remove a completion that has ended. After the last completion, remove its request."""
        live, _ = self._completions.pop(completion.request.id)
        if live.finished:
            del self._live[live.id]
            self._deadlines.forget(live.id)

    def close(self, live: LiveRequest) -> list[str]:
        """Remove a request. Return the engine's ids of its unfinished completions; [] if it is not in the ledger."""
        if self._live.get(live.id) is not live:
            return []
        del self._live[live.id]
        self._deadlines.forget(live.id)
        unfinished = [completion.request.id for completion in live.unfinished]
        for engine_id in unfinished:
            del self._completions[engine_id]
        return unfinished

    def renew(self, live: LiveRequest) -> None:
        """Give the unfinished completions new engine's ids, before they are sent to another engine.

        So late outputs of the engine before are not found in the ledger.
        """
        first: str | None = None
        for completion in live.unfinished:
            del self._completions[completion.request.id]
            id = next(self._engine_ids)
            completion.request = msgspec.structs.replace(completion.request, id=id, after=first)
            self._completions[id] = (live, completion)
            first = first or id

    def get(self, id: str) -> LiveRequest | None:
        return self._live.get(id)

    def overdue(self) -> list[LiveRequest]:
        """Return the requests whose deadline has passed. Each is returned once."""
        return [self._live[id] for id in self._deadlines.passed(time.monotonic())]

    @property
    def next_deadline(self) -> float | None:
        """Return the earliest deadline, in seconds of time.monotonic()."""
        return self._deadlines.next

    def _live_request(self, request: Request, tokens: list[int], sink: Sink, id: str) -> LiveRequest:
        params, terms = request.params, request.terms
        live = LiveRequest(
            id=id,
            prompt=request.prompt if isinstance(request.prompt, str) else None,
            prompt_token_ids=tokens,
            params=params,
            seed=secrets.randbits(SEED_BITS) if params.seed is None else params.seed % 2**64,
            tokenizer=self._tokenizer,
            sink=sink,
            completions=[],
            metrics=RequestMetrics(arrival_time=time.time()),
            arrival=time.monotonic(),
            timeout=self._request_timeout if terms.timeout is None else terms.timeout,
            state=request.state,
        )
        capacity = max_output(params, len(tokens), self._info, self._max_new_tokens)
        banned = banned_tokens(params.bad_words or (), self._tokenizer)
        thinking = thinking_of(params, self._tokenizer, self._reasoning_parser)
        first: str | None = None
        for index in range(params.num_completions):
            engine_request = EngineRequest(
                id=next(self._engine_ids),
                prompt=tokens,
                params=self._engine_params(params, index, live.seed, capacity),
                banned=banned,
                thinking=thinking,
                eos=[] if params.ignore_eos else self._eos,
                after=first,
                tenant=terms.tenant,
                weight=self.tenant_weights.get(terms.tenant),
                salt=terms.cache_salt or "",
                origin=request.state.origin if request.state else "",
                priority=terms.priority,
                ttft_target=terms.ttft_target,
                timeout=live.timeout,
                pooling=request.pooling,
                is_traced=self.is_traced,
            )
            first = first or engine_request.id
            live.completions.append(self._completion(engine_request, index, params))
        return live

    def _engine_params(self, params: SamplingParams, index: int, seed: int, capacity: int) -> SamplingParams:
        """Return the parameters of completion `index`, as the engine gets them: resolved, and without what it ignores.

        Args:
            capacity: the maximum tokens of output.
        """

        def count(wanted: int | None) -> int | None:
            return self._info.vocab_size if wanted == -1 else wanted

        is_ranked = params.num_completions > params.n
        return msgspec.structs.replace(
            params,
            n=1,
            best_of=None,
            stop=None,
            bad_words=None,
            repetition_detection=None,
            thinking_token_budget=None,
            output_kind=RequestOutputKind.DELTA,
            seed=(seed + index) % 2**64,
            max_tokens=capacity,
            min_tokens=min(params.min_tokens, capacity),
            logprobs=0 if is_ranked and params.logprobs is None else count(params.logprobs),
            prompt_logprobs=None if index else count(params.prompt_logprobs),
        )

    def _completion(self, request: EngineRequest, index: int, params: SamplingParams) -> LiveCompletion:
        detection = params.repetition_detection
        return LiveCompletion(
            request,
            index,
            Detokenizer(self._tokenizer, params.skip_special_tokens),
            StopStrings(params.stop_strings),
            RepetitionDetector(detection) if detection is not None and detection.max_pattern_size else None,
            params.logprobs is not None,
        )

"""The engine: one `step()` that schedules and launches what can be, and emits the tokens of a launched step."""

import time
from array import array
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import numpy as np

from octavo.backends.base import Backend, StepResult
from octavo.config import EngineConfig
from octavo.kv import KVCache, Prefix, Transfers, root_key
from octavo.kv.page_map import page_map
from octavo.states.file import StateFile
from octavo.states.jobs import StateFiles
from octavo.tracing.engine import EngineTrace
from octavo.tracing.records import IDLE
from octavo.tracing.request_events import CHUNK, RequestEvents

from .batch import BatchBuilder
from .constraints import Constraints
from .counters import Counters
from .deadlines import Deadlines
from .engine_plan import EnginePlan
from .messages import EngineInfo, EngineRequest, EngineStats, TokenLogprobs, TokenOutput
from .policies import Policy
from .pooling import pooled_vector, take_pooled
from .recovery import Recovery
from .running_ahead import LaunchedStep, rows_of, runs_ahead
from .scheduler import Scheduler, StepPlan
from .sequence import Sequence
from .thinking import ThinkingBudget
from .token_masks import mask_of
from .work_record import WorkRecord

if TYPE_CHECKING:
    from octavo.formats.page_cipher import PageCipher
    from octavo.kv.store.sharing import Sharing

MAX_IDLE = 0.002  # seconds for which a step without work waits for threads; a new request may wait as long
SECONDS_TO_CLOSE = 3.0  # the frontend kills an engine process that does not end in 5
_NO_STEP = StepPlan([], [])
_DAMAGED_LOGITS = "the model computed logits that are NaN or infinite"
_NO_TOKEN = "no token is left to sample: all that are allowed are banned, or the model computed logits that are NaN"


class Engine:
    """Generates tokens for many requests at once on one backend, whose KV pool of `num_pages` pages is allocated.

    Not thread-safe: call the methods from one thread, except for those marked "from any thread". All state of the
    engine can be rebuilt from the requests and from the tokens it has returned.

    Args:
        max_model_len: maximum tokens of prompt and output together.
        max_batch_size: maximum number of running sequences.
        max_batch_tokens: maximum number of tokens that a step computes.
        policy: the order in which requests are served; first come, first served by default.
        transfers: moves pages to and from the tiers below the pool; by default there are no tiers.
        preemption: see Recovery.
        fingerprint: identifies everything that determines the bits of a page. Engines share pages only if their
            fingerprints are equal.
        speculative_tokens: draft tokens per sequence and step, for requests that set none.
        request_timeout: timeout in seconds of requests that set none; None for no timeout.
        work: the record of the engine's current work.
        clock: returns monotonic time in seconds; a simulation passes a virtual clock.
        constraints: follows the grammars of structured outputs; without it, such requests fail.
        trace: takes the times of steps (docs/tracing.md).
        cipher: encrypts saved KV states.
        sharing: shares pages with other engines, through a store at least.
        open_sharing: makes what shares pages with other engines directly, if `sharing` is None; called when pages are
            to be served. None: this engine serves none.

    Attributes:
        request_events: what has happened to the requests that are traced.
    """

    def __init__(
        self,
        backend: Backend,
        *,
        num_pages: int,
        max_model_len: int,
        max_batch_size: int,
        max_batch_tokens: int,
        policy: Policy | None = None,
        prefix_caching: bool = True,
        transfers: Transfers | None = None,
        preemption: str = "auto",
        fingerprint: str = "",
        speculative_tokens: int = 0,
        request_timeout: float | None = None,
        work: WorkRecord | None = None,
        clock: Callable[[], float] = time.monotonic,
        constraints: Constraints | None = None,
        trace: EngineTrace | None = None,
        cipher: "PageCipher | None" = None,
        sharing: "Sharing | None" = None,
        open_sharing: Callable[[], "Sharing"] | None = None,
    ):
        self.backend, self.fingerprint, self.clock, self.trace = backend, fingerprint, clock, trace
        self.request_events = RequestEvents()
        self._transfers = transfers or Transfers(backend, ())
        copy_page = backend.copy_page if trace is None else trace.copying(backend.copy_page)
        self.kv = KVCache(num_pages, backend.page_size, prefix_caching, copy_page, self._transfers, sharing)
        self._open_sharing = open_sharing if prefix_caching else None
        self._state_files = StateFiles(self.kv, backend, self._transfers, cipher)
        self.scheduler = Scheduler(
            self.kv,
            policy or Policy(EngineConfig()),
            Recovery(preemption, backend.page_size),
            max_batch_size,
            max_batch_tokens,
            self._fail,
            self.request_events,
        )
        self.max_model_len = min(max_model_len, num_pages * backend.page_size)
        max_pages = self.kv.pages_for(self.max_model_len)
        self._builder = BatchBuilder(self.scheduler.max_running, max_pages, backend.page_size, backend.spec.hidden_size)
        self._constraints = constraints
        self._live: dict[str, Sequence] = {}
        self._failures: list[TokenOutput] = []  # to be returned by the next step
        self._deadlines = Deadlines()
        self._request_timeout = request_timeout
        self._speculative_tokens = speculative_tokens
        self.rows = 0  # tokens that the backend is computing now; may be read by any thread
        self.plan: EnginePlan | None = None  # what was decided when it was loaded, set by load_engine
        self.role = "both"  # for the frontend, set by load_engine
        self.slowest_step = (0.0, 1)  # seconds and rows of the slowest step so far
        self._work = work or WorkRecord()
        self._num_added = 0
        self._plan = _NO_STEP  # plan of the last step
        self._launched: deque[LaunchedStep] = deque()  # steps whose results have not been read, the first one first
        self._most_launched = 2 if backend.runs_ahead else 1
        self._counters = Counters()
        self._last_step = 0.0  # seconds that the last step took

    @property
    def has_work(self) -> bool:
        """Return whether `step` has anything to do."""
        compiling = self._constraints is not None and self._constraints.is_compiling
        waiting = self.scheduler.has_work or compiling or self.kv.is_moving
        return waiting or bool(self._launched or self._failures)

    @property
    def info(self) -> EngineInfo:
        return EngineInfo(
            max_model_len=self.max_model_len,
            vocab_size=self.backend.spec.vocab_size,
            num_pages=self.kv.pool.num_pages,
            page_size=self.kv.page_size,
            fingerprint=self.fingerprint,
            hidden_size=self.backend.spec.hidden_size,
            plan=self.plan,
            role=self.role,
        )

    @property
    def usual_root(self) -> bytes:
        """Return the root of sequences without a tenant, salt and origin."""
        return root_key(self.fingerprint, "", "")

    def add(self, request: EngineRequest) -> None:
        """Queue a request. If it can never be served, the next step returns an error for it."""
        try:
            tokens = array("i", request.prompt + request.output)
        except OverflowError:
            tokens = array("i", [-1])  # no token, and refused like any other such id
        if problem := self._problem(request, tokens):
            self._failures.append(TokenOutput(request.id, -1, "error", message=problem))
            return
        self._work.serving(request.id)
        params = request.params
        seq = Sequence(
            request=request,
            order=self._num_added,
            stop_tokens=frozenset(request.eos).union(params.stop_token_ids or ()),
            tokens=tokens,
            prefix=self._prefix(tokens, request.tenant, request.salt, request.origin),
            num_prompt=len(request.prompt),
            max_tokens=min(len(request.prompt) + (params.max_tokens or self.max_model_len), self.max_model_len),
            draft_limit=self._draft_limit(request),
            arrival=self.clock() - request.age,
            scores=None if params.prompt_logprobs is None or request.output else [],
            allowed=None if params.allowed_token_ids is None else mask_of(params.allowed_token_ids),
        )
        if request.thinking is not None:
            seq.thinking = ThinkingBudget(request.thinking, tokens, seq.num_prompt)
        self._num_added += 1
        self._live[request.id] = seq
        if request.source is not None and self.kv.sharing is not None:
            pages = min(request.source.pages, (len(tokens) - 1) // self.kv.page_size)
            self.kv.sharing.expect(request.source.address, [seq.prefix.key(page) for page in range(pages)])
        if (timeout := self._timeout(request)) is not None:
            self._deadlines.set(request.id, seq.arrival + timeout)
        if params.structured_outputs is None or self._constraints is None or self._constraints.begin(seq):
            self._queue(seq)
        self._note_launched()

    def _queue(self, seq: Sequence) -> None:
        self.scheduler.add(seq, self._live.get(seq.request.after or ""))

    def _settle_constraints(self, constraints: Constraints) -> None:
        """Queue the sequences whose grammars have been compiled; fail those whose grammars are refused or too slow."""
        for seq in constraints.settle(self._last_step):
            self.scheduler.abort(seq)
            self._fail(seq, f"structured_outputs failed: {seq.grammar_error}", "invalid")
        for seq, reason in constraints.compiled():
            if reason is None and seq.matcher is not None and seq.matcher.is_stopped and seq.num_outputs:
                reason = "the output was complete already"
            if reason is None:
                self._queue(seq)
            else:
                self.scheduler.end_prompt(seq)
                self._fail(seq, reason)

    def _remove(self, seq: Sequence) -> None:
        """Remove a sequence from the scheduler, or from those whose grammars are being compiled."""
        if self._constraints is None or not self._constraints.cancel(seq.id):
            self.scheduler.abort(seq)
        else:
            self.scheduler.end_prompt(seq)

    def abort(self, ids: Iterable[str]) -> None:
        """Abort requests and release their pages at once. Unknown and finished ids are ignored."""
        for id in ids:
            if seq := self._live.pop(id, None):
                self._deadlines.forget(id)
                self._remove(seq)

    def pin(self, id: str, tokens: Iterable[int], tenant: str = "", salt: str = "", origin: str = "") -> None:
        """Keep the pages of a KV state that are computed until `unpin`, or until running sequences need them.

        Args:
            id: the id of the state.
            tokens: the tokens of the state.
            tenant, salt, origin: those of the state, as in EngineRequest.
        """
        self.kv.pin(id, self._prefix(array("i", tokens), tenant, salt, origin))

    def reset_cache(self) -> bool:
        """Evict all cached pages; see KVCache.reset."""
        now = time.monotonic()
        while self._launched and not self.scheduler.running:  # what they compute is for sequences that have ended
            self._finish(now, now, now)
        return self.kv.reset()

    def unpin(self, id: str) -> None:
        """Release the pages of a KV state, and close the file that `load_state` opened."""
        self.kv.unpin(id)
        self._state_files.close(id)

    def serve_pages(self) -> int:
        """Serve the pages of the cache to other engines from now on. Return the port; 0 if that is not possible."""
        if self.kv.sharing is None and self._open_sharing is not None:
            self.kv.sharing = self._open_sharing()
        return 0 if self.kv.sharing is None else self.kv.sharing.serve(self.kv.pool)

    def save_state(self, path: Path, tokens: Iterable[int], tenant: str, salt: str, origin: str = "") -> "Future[None]":
        """Begin to write a KV state to a file, in a thread. Call `end_saves` when the returned future is done.

        The future raises RequestFailed if the file cannot be written.
        """
        state = array("i", tokens)
        prefix, saved = self._prefix(state, tenant, salt, origin), self._prefix(state, tenant, salt, "")
        return self._state_files.save(path, prefix, saved, self.fingerprint)

    def end_saves(self) -> None:
        """Release the pages of KV states that have been written."""
        self._state_files.end_saves()

    def load_state(self, id: str, path: Path) -> "Future[StateFile]":
        """Open a KV state's file, so that requests with the origin `id` find pages in it until `unpin`.

        The future is done when the file is open; it raises InvalidKVState.
        """
        return self._state_files.load(id, path)

    def step(self) -> list[TokenOutput]:
        """Return the new tokens of one batch, and the outputs of requests that failed or timed out.

        If the backend runs ahead, launch the next batch before reading these tokens. If there is no batch to compute,
        wait for transfers, grammars and masks, at most MAX_IDLE seconds.
        """
        started = time.monotonic()
        if self._constraints is not None:
            self._settle_constraints(self._constraints)
        outputs, self._failures = self._failures + self._time_out(), []
        collecting = time.monotonic()
        self.kv.collect()
        scheduling = time.monotonic()
        while len(self._launched) < self._most_launched:
            plan = self.scheduler.schedule(may_preempt=not self._launched)
            if not plan.sequences:
                break
            self._launch(plan)
        if self._launched:
            outputs += self._finish(started, collecting, scheduling)
        else:
            self._plan = _NO_STEP
            if not outputs:
                self._wait()
        return outputs

    def _launch(self, plan: StepPlan) -> None:
        """Build the batch of a step, and launch it."""
        batch = self._builder.build(plan)
        prompts = plan.sequences[plan.num_decoding :]
        self._note_launched(prompts)
        self.rows += len(batch.tokens)
        began, clock = time.monotonic(), self.clock()
        for seq in prompts:
            if seq.started is None:
                seq.started = clock
        step = LaunchedStep(plan, len(batch.tokens), *rows_of(plan, batch), self.backend.launch(batch), began, clock)
        self._launched.append(step)
        if self._most_launched > 1:
            self._run_ahead(step)

    def _run_ahead(self, step: LaunchedStep) -> None:
        """Let the next step go on after a launched one, with the sequences for which it can.

        The pages that the step writes stay referenced until it has ended, whatever becomes of their sequences.
        """
        plan, page_size = step.plan, self.kv.page_size
        for i, (seq, chunk, begin) in enumerate(zip(plan.sequences, plan.chunks, step.begins, strict=True)):
            end = begin + chunk + len(plan.drafts.get(i, ()))
            for page in seq.page_table.pages[begin // page_size : -(-end // page_size)]:
                self.kv.pool.acquire(page)
                step.pages.append(page)
            samples = plan.samples(i)
            if runs_ahead(seq, samples):
                seq.run_ahead(chunk, samples)
            else:
                seq.awaited = True

    def _finish(self, started: float, collecting: float, scheduling: float) -> list[TokenOutput]:
        """Wait for the first launched step, and return its outputs.

        Args:
            started, collecting, scheduling: when this call of `step` and its stages began.
        """
        waiting = time.monotonic()
        step = self._launched[0]
        result = step.pending.result()
        emitting, clock = time.monotonic(), self.clock()
        self._launched.popleft()
        self._note_launched()
        for page in step.pages:
            self.kv.pool.release(page)
        self.rows -= step.rows
        seconds = emitting - step.began
        computing = step.began if step.began > scheduling else waiting
        if seconds > self.slowest_step[0]:
            self.slowest_step = (seconds, step.rows)
        self.scheduler.recovery.record_step(step.rows, clock - step.clock)
        for later in self._launched:
            later.began, later.clock = emitting, clock
        self._plan = plan = step.plan
        for seq, chunk in zip(step.prompts, plan.chunks[plan.num_decoding :], strict=True):
            if seq.request.is_traced:
                self.request_events.add(seq.id, CHUNK, chunk)
        outputs = self._advance(plan, step.begins, step.first_rows, result)
        ended = time.monotonic()
        self._last_step = ended - started
        self._counters.count_step(step.rows, self._last_step, emitting - computing)
        if self.trace is not None:
            decode, drafts = plan.num_decoding, sum(map(len, plan.drafts.values())) if plan.drafts else 0
            counts = (sum(plan.chunks[decode:]), decode, drafts)
            self.trace.step(collecting, scheduling, computing, emitting, ended, counts)
        return outputs

    def _note_launched(self, *about_to_be: list[Sequence]) -> None:
        """Record whose prompts the launched steps have, and a step that is about to be launched."""
        steps = [step.prompts for step in self._launched] + [*about_to_be]
        if steps:
            self._work.computing([seq.id for prompts in steps for seq in prompts])
        else:
            self._work.nothing()

    def _wait(self) -> None:
        """Wait for the threads without which no sequence can continue, for at most MAX_IDLE seconds."""
        began = time.monotonic()
        if self._constraints is not None and (self.scheduler.running or self._constraints.is_compiling):
            self._constraints.wait(MAX_IDLE)
        else:
            self.kv.wait(MAX_IDLE)
        if self.trace is not None:
            self.trace.slice("wait for transfers or grammars", IDLE, began)

    def stats(self) -> EngineStats:
        """Return statistics of the current state. From any thread."""
        pool, transfers = self.kv.pool, self.kv.transfers
        plan = self._plan if self.has_work else _NO_STEP
        return EngineStats(
            running=len(self.scheduler.running),
            waiting=self.scheduler.num_waiting,
            waiting_for_pages=self.scheduler.num_waiting_for_pages,
            waiting_for_prompt=self.scheduler.num_waiting_for_prompt,
            free_pages=pool.num_available - pool.num_cached,
            cached_pages=pool.num_cached,
            num_pages=pool.num_pages,
            preemptions=self.scheduler.preemptions,
            decode_rows=plan.num_decoding,
            prefill_rows=sum(plan.chunks) - plan.num_decoding,
            draft_rows=sum(map(len, plan.drafts.values())),
            page_map=page_map(self.kv),
            num_pinned=len(self.kv.pinned_pages()),
            num_fetching=self.kv.num_fetching,
            pending_saves=self.kv.num_pending_saves,
            pages_saved=self.kv.pages_saved,
            pages_fetched=self.kv.pages_fetched,
            refused_pages=transfers.pages_refused if transfers else 0,
            tiers=self.kv.tier_counts(),
            **asdict(self._counters),
        )

    def end_transfers(self) -> None:
        """Finish pending transfers within SECONDS_TO_CLOSE, and begin no new ones. From any thread."""
        if self.kv.sharing is not None:
            self.kv.sharing.close()
        self._transfers.close(SECONDS_TO_CLOSE)

    def close(self) -> None:
        """Save the full pages that are not saved yet, within SECONDS_TO_CLOSE, and free the backend."""
        if self._constraints is not None:
            self._constraints.close()
        self.kv.flush(SECONDS_TO_CLOSE)
        self.end_transfers()
        self.backend.close()

    def _prefix(self, tokens: "array[int]", tenant: str, salt: str, origin: str) -> Prefix:
        return Prefix(root_key(self.fingerprint, tenant, salt, origin), tokens, self.kv.page_size)

    def _draft_limit(self, request: EngineRequest) -> int:
        if request.pooling is not None:
            return 0
        own = request.params.speculative_tokens
        return self._speculative_tokens if own is None else own

    def _timeout(self, request: EngineRequest) -> float | None:
        return self._request_timeout if request.timeout is None else request.timeout

    def _time_out(self) -> list[TokenOutput]:
        """Abort the requests whose deadline has passed, running or waiting, and return an output for each."""
        outputs = []
        for id in self._deadlines.passed(self.clock()):
            seq = self._live.pop(id)
            self._remove(seq)
            message = f"the request did not end within its timeout of {self._timeout(seq.request):g} seconds"
            outputs.append(TokenOutput(id, -1, "timeout", message=message))
        return outputs

    def _problem(self, request: EngineRequest, tokens: "array[int]") -> str | None:
        """Return the reason why a request cannot be served, or None. The frontend makes the same checks earlier."""
        if request.id in self._live:
            return f"there is a live request with the id {request.id!r}"
        if not 0 < len(tokens) < self.max_model_len:
            return f"the prompt must have from 1 to {self.max_model_len - 1} tokens, not {len(request.prompt)}"
        ids = np.frombuffer(tokens, np.intc)
        if ids.min() < 0 or ids.max() >= self.backend.spec.vocab_size:
            return f"prompt tokens must be from 0 to {self.backend.spec.vocab_size - 1}"
        if request.params.structured_outputs is not None and self._constraints is None:
            return "this engine has no vocabulary for structured outputs"
        labels = request.pooling.labels if request.pooling is not None else ()
        if not all(0 <= label < self.backend.spec.vocab_size for label in labels):
            return f"labels must be tokens from 0 to {self.backend.spec.vocab_size - 1}"
        return None

    def _advance(
        self, plan: StepPlan, begins: list[int], first_rows: list[int] | range, result: StepResult
    ) -> list[TokenOutput]:
        """Record what a step computed, append the sampled tokens, and end finished sequences.

        Args:
            begins, first_rows: see LaunchedStep.
        """
        outputs: list[TokenOutput] = []
        constrained: list[Sequence] = []
        pooled: list[TokenOutput] = []
        tokens, page_size = result.tokens.tolist(), self.kv.page_size
        take_pooled(plan, result)
        for i, (seq, chunk, before, row) in enumerate(
            zip(plan.sequences, plan.chunks, begins, first_rows, strict=True)
        ):
            if seq.slot < 0:  # it has ended since the step was launched
                continue
            computed, launched = before + chunk, seq.num_computed
            if launched == before:  # it has awaited this result
                seq.awaited = False
                if seq.unscored is not None:
                    row = self._score(seq, chunk, result, row)
                seq.num_computed = computed
            else:
                seq.ahead_from = computed if launched > computed else None
                if computed < len(seq.tokens) and seq.tokens[computed] < 0:
                    seq.num_computed, seq.ahead_from = computed, None
                    del seq.tokens[computed:]
            if before // page_size < computed // page_size:
                self.kv.commit(seq.page_table, computed)
            if before < seq.num_prompt <= computed:
                self._end_prompt(seq)
            if computed < len(seq.tokens):
                continue
            if seq.pooling is not None:
                pooled.append(self._end_pooled(seq))
                continue
            outputs.append(self._append(seq, tokens[row], result, row))
            if launched > computed and seq.slot >= 0:  # the next step, launched already, computes this token
                seq.run_ahead(1, samples=True)
            if i in plan.drafts:
                outputs += self._append_accepted(seq, plan.drafts[i], result, row + 1)
            if seq.matcher is not None and seq.slot >= 0:
                constrained.append(seq)
        if constrained and self._constraints is not None:
            self._constraints.follow(constrained, len(self.scheduler.running))
        self._counters.tokens_computed += sum(plan.chunks)
        self._counters.tokens_generated += len(outputs)
        return outputs + pooled

    def _score(self, seq: Sequence, chunk: int, result: StepResult, row: int) -> int:
        """Record the logprobs of prompt tokens that a chunk gives, which are the rows of `result` from `row` on.

        Returns the row after them.
        """
        assert seq.scores is not None
        end = row + seq.num_scored(chunk)
        seq.scores.append(_logprobs(result, row, end, seq.request.params.prompt_logprobs))
        seq.scored += end - row
        return end

    def _append_accepted(self, seq: Sequence, draft: "array[int]", result: StepResult, row: int) -> list[TokenOutput]:
        """Append the tokens sampled after accepted draft tokens, which are the rows of `result` from `row` on.

        A draft token is accepted if it equals the token sampled before it and all earlier draft tokens were accepted.
        """
        outputs: list[TokenOutput] = []
        for token in draft:
            if seq.slot < 0 or token != seq.tokens[-1]:
                break
            seq.num_computed += 1
            self.kv.commit(seq.page_table, seq.num_computed)
            outputs.append(self._append(seq, int(result.tokens[row]), result, row))
            row += 1
        self._counters.count_draft(len(draft), accepted=len(outputs))
        return outputs

    def _end_prompt(self, seq: Sequence) -> None:
        """Record that a prompt is computed, for the first time or after a preemption."""
        if not seq.num_outputs:
            self._counters.count_prompt(seq.num_prompt, seq.cached_tokens)
            if seq.started is not None:
                seq.time_in_queue = seq.started - seq.arrival
        self.scheduler.end_prompt(seq)

    def _append(self, seq: Sequence, token: int, result: StepResult, row: int) -> TokenOutput:
        """Append the sequence's next token, sampled in a row of `result`, and return its output. It may be the last."""
        wanted = seq.request.params.logprobs
        logprobs = None if wanted is None else _logprobs(result, row, row + 1, wanted)
        seq.tokens.append(token)
        if seq.thinking is not None:
            seq.thinking.advance()
        ends_grammar = seq.matcher is not None and self._ends_grammar(seq, token)
        if ends_grammar or token < 0 or token in seq.stop_tokens or len(seq.tokens) >= seq.max_tokens:
            output = self._end(seq, token, logprobs)
        else:
            output = TokenOutput(seq.request.id, token, None, None, logprobs, seq.cached_tokens)
        if seq.time_in_queue is None:
            return output
        return self._first_output(seq, output)

    def _first_output(self, seq: Sequence, output: TokenOutput) -> TokenOutput:
        """Return a sequence's first output, with what is known when the prompt is computed."""
        waited, seq.time_in_queue = seq.time_in_queue, None
        scores = None
        if seq.scores is not None:
            scores, seq.scores = TokenLogprobs.joined(seq.scores), None
        return msgspec.structs.replace(output, prompt_logprobs=scores, time_in_queue=waited)

    def _end_pooled(self, seq: Sequence) -> TokenOutput:
        """End a pooled sequence, whose prompt is computed, and return its output."""
        vector = pooled_vector(seq)
        self._remove_finished(seq)
        if not np.isfinite(vector).all():
            message = "the model computed hidden states or logits that are NaN or infinite"
            return TokenOutput(seq.id, -1, "error", message=message)
        output = TokenOutput(seq.id, -1, "length", cached_tokens=seq.cached_tokens, pooled=vector.tobytes())
        return msgspec.structs.replace(output, time_in_queue=seq.time_in_queue)

    def _remove_finished(self, seq: Sequence) -> None:
        del self._live[seq.id]
        self._deadlines.forget(seq.id)
        self._counters.count_ended(seq.preemptions)
        self.scheduler.finish(seq)

    def _ends_grammar(self, seq: Sequence, token: int) -> bool:
        """Advance a sequence's grammar by a token. Return whether the output is complete, or the grammar fails."""
        assert seq.matcher is not None
        if token < 0 or seq.grammar_error is not None:
            return True
        if token in seq.stop_tokens and token not in seq.request.eos:
            return False  # the user's stop token ends the output in any case
        try:
            seq.matcher.accept([token])
            return seq.matcher.is_stopped
        except Exception as error:  # a fault in a grammar ends its own request only
            seq.grammar_error = str(error) or repr(error)
            return True

    def _end(self, seq: Sequence, token: int, logprobs: TokenLogprobs | None) -> TokenOutput:
        """Return the output of a token that may end the sequence, and end it unless min_tokens forbids that."""
        reason = message = stop_token = None
        in_text = False
        if token < 0 and (seq.allowed or seq.matcher):
            reason, message = "invalid", _NO_TOKEN
        elif token < 0:
            reason, message = "error", _DAMAGED_LOGITS
            self._counters.damaged += 1
        elif seq.grammar_error is not None:
            reason, message = "invalid", f"structured_outputs failed: {seq.grammar_error}"
        elif token in seq.stop_tokens and seq.num_outputs >= seq.request.params.min_tokens:
            reason, stop_token = "stop", token if token not in seq.request.eos else None
        elif seq.matcher is not None and seq.matcher.is_stopped:
            reason, in_text = "stop", not seq.matcher.is_end(token)
        elif len(seq.tokens) >= seq.max_tokens:
            reason = "length"
        if reason:
            self._remove_finished(seq)
        return TokenOutput(seq.id, token, reason, stop_token, logprobs, seq.cached_tokens, message, in_text)

    def _fail(self, seq: Sequence, message: str, reason: str = "error") -> None:
        """Make the next step end a sequence that the scheduler has removed: with "error", or "invalid"."""
        del self._live[seq.id]
        self._deadlines.forget(seq.id)
        self._failures.append(TokenOutput(seq.id, -1, reason, message=message))


def _logprobs(result: StepResult, begin: int, end: int, wanted: int | None) -> TokenLogprobs:
    """Return the logprobs of the rows from `begin` to `end`, with those of the `wanted` likeliest tokens."""
    assert result.logprobs is not None and result.ranks is not None
    logprobs, ranks = result.logprobs[begin:end].tobytes(), result.ranks[begin:end].tobytes()
    if not wanted:
        return TokenLogprobs(logprobs, ranks)
    assert result.top_tokens is not None and result.top_logprobs is not None
    likeliest = result.top_tokens[begin:end, :wanted], result.top_logprobs[begin:end, :wanted]
    return TokenLogprobs(logprobs, ranks, likeliest[0].tobytes(), likeliest[1].tobytes())

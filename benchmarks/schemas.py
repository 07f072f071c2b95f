"""Schemas: whether outputs are valid at a high temperature, and what constrained outputs cost.

    python benchmarks/schemas.py [--model smollm2] [--runs 1000] [--streams 64] [--rounds 5]

1. Validity: `runs` outputs at temperature 1.5, over all schemas of schema_cases.py. Each must be complete, and valid
   by the package jsonschema with its checks of formats. A truncated output counts as a failure.
2. Throughput: `streams` outputs of as many tokens each, by turns with and without a schema.
3. Time to the first token of one request, by turns: without a schema, with a schema that no request had before, and
   with one that an earlier request had.

The exit code is 1 if an output is not valid, or if the throughput is below 90 %, or if the first token comes over 30 ms
later with a new schema, or over 1 ms later with a known one (medians).
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Iterator
from typing import Any

import jsonschema
from schema_cases import POINT, SCHEMAS, SHORT, record, several

from octavo import LLM, CompletionOutput, SamplingParams, StructuredOutputs

LONG = record(items=several(record(name=SHORT, place=POINT), 1000, 1000))  # does not end before max_tokens
CHECKER = jsonschema.FormatChecker(["date", "email", "ipv4", "ipv6", "uuid"])  # the others are checked less strictly


def constrained(schema: dict[str, Any], **terms: Any) -> SamplingParams:
    outputs = StructuredOutputs(json=schema, disable_any_whitespace=True)
    return SamplingParams(temperature=1.5, structured_outputs=outputs, **terms)


def fault(output: CompletionOutput, schema: dict[str, Any]) -> str | None:
    """Return what is wrong with an output; None if it is complete and valid."""
    if output.finish_reason != "stop":
        return f"it ended with {output.finish_reason}"
    try:
        jsonschema.validate(json.loads(output.text), schema, format_checker=CHECKER)
    except (ValueError, jsonschema.ValidationError) as error:
        return str(error).splitlines()[0]
    return None


def check_validity(llm: LLM, runs: int) -> bool:
    schemas = [SCHEMAS[i % len(SCHEMAS)] for i in range(runs)]
    params = [constrained(schema, seed=i, max_tokens=1000) for i, schema in enumerate(schemas)]
    outputs = [output.outputs[0] for output in llm.generate([f"Answer {i}, as JSON:" for i in range(runs)], params)]
    faults = [
        (schema, output.text, reason)
        for schema, output in zip(schemas, outputs, strict=True)
        if (reason := fault(output, schema)) is not None
    ]
    for schema, text, reason in faults:
        print(f"{json.dumps(schema)}: {text[:80]!r}: {reason}")
    print(f"valid: {runs - len(faults)} of {runs} outputs, over {len(SCHEMAS)} schemas")
    return not faults


def tokens_per_second(llm: LLM, streams: int, params: SamplingParams) -> float:
    started = time.monotonic()
    outputs = llm.generate([f"List number {i}:" for i in range(streams)], params)
    return sum(len(output.outputs[0].token_ids) for output in outputs) / (time.monotonic() - started)


def check_throughput(llm: LLM, streams: int, tokens: int, rounds: int) -> bool:
    with_schema = constrained(LONG, max_tokens=tokens)
    without = SamplingParams(temperature=1.5, max_tokens=tokens, ignore_eos=True)
    speeds: dict[str, list[float]] = {"with": [], "without": []}
    for _ in range(rounds + 1):
        speeds["with"].append(tokens_per_second(llm, streams, with_schema))
        speeds["without"].append(tokens_per_second(llm, streams, without))
    constrained_speed, free_speed = (statistics.median(each[1:]) for each in speeds.values())
    ratio = constrained_speed / free_speed
    print(f"throughput: {constrained_speed:.0f} tokens/s with a schema, {free_speed:.0f} without: {ratio:.1%}")
    return ratio >= 0.9


def new_schemas() -> Iterator[dict[str, Any]]:
    """Yield schemas of the size that applications use, each with other names."""
    for i in range(10**6):
        item = record(**{f"name_{i}": SHORT, "place": POINT, "kind": {"enum": [f"kind {i} {k}" for k in range(20)]}})
        yield record(items=several(item, 0, 9), note=SHORT)


def first_token_ms(llm: LLM, params: SamplingParams) -> float:
    started = time.monotonic()
    llm.generate("The answer, as JSON:", params)
    return (time.monotonic() - started) * 1e3


def check_first_tokens(llm: LLM, rounds: int) -> bool:
    schemas, repeated = new_schemas(), constrained(LONG, max_tokens=1)
    free = SamplingParams(temperature=1.5, max_tokens=1)
    times: dict[str, list[float]] = {"none": [], "new": [], "known": []}
    for _ in range(10 * rounds + 1):
        times["none"].append(first_token_ms(llm, free))
        times["new"].append(first_token_ms(llm, constrained(next(schemas), max_tokens=1)))
        times["known"].append(first_token_ms(llm, repeated))
    print(f"the first grammar of all: {times['new'][0] - times['none'][0]:.0f} ms later")
    none, new, known = (statistics.median(each[1:]) for each in times.values())
    print(f"first token: {none:.1f} ms; {new - none:+.1f} with a new schema, {known - none:+.1f} with a known one")
    return new - none <= 30 and known - none <= 1


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--runs", type=int, default=1000)
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=64, help="of each stream")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    with LLM(arguments.model, max_batch_size=arguments.streams) as llm:
        good = check_first_tokens(llm, arguments.rounds)
        good = check_throughput(llm, arguments.streams, arguments.tokens, arguments.rounds) and good
        good = (check_validity(llm, arguments.runs) if arguments.runs else True) and good
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())

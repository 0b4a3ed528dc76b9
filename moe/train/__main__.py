"""`python -m moe.train SPEC --out DIR`: train one experiment, with no service anywhere.

SPEC is a .json or .yaml file, or the name of a preset. The run goes on from the newest whole checkpoint in DIR.
Signals, exit codes and what is left in DIR: docs/protocol.md, sections 1 and 2.
"""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from pathlib import Path

from moe.train import stop

PROJECT = Path(__file__).resolve().parents[2]


def main(arguments: list[str]) -> int:
    """Trains, and returns the exit code."""
    options = _parser().parse_args(arguments)
    # Threads that spin while they wait for each other stand still when another process has the core: on two busy cores a step
    # of two spinning threads takes 15 times as long. OpenMP reads this when torch is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    requests = stop.Requests()
    requests.listen()  # Before the slow imports: a SIGTERM in the first seconds is a request like any other.
    directory = options.out / "attempts" / str(options.attempt)
    try:
        detail = _train(options, requests)
        code, reason = stop.FINISHED, "finished"
    except Exception as error:  # whatever ends the training has an exit code and leaves a result
        code, reason = stop.classify(error)
        detail = str(error) or type(error).__name__
        if code in (stop.ERROR, stop.OUT_OF_MEMORY):
            traceback.print_exc()
        print(f"{reason}: {detail}", file=sys.stderr, flush=True)
    if int(os.environ.get("RANK", "0")) == 0:
        stop.write_result(directory, {stop.FINISHED: "succeeded", stop.STOPPED: "stopped"}.get(code, "failed"), reason, detail)
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m moe.train", description="Train one experiment on this machine.")
    parser.add_argument("spec", help="a .json or .yaml file, or the name of a preset")
    parser.add_argument("--out", type=Path, required=True, help="the run's directory: events, checkpoints, result")
    parser.add_argument("--attempt", type=int, default=0, help="number of this attempt (default 0)")
    parser.add_argument("--no-resume", action="store_true", help="start from the beginning; earlier checkpoints are put aside")
    return parser


def _train(options: argparse.Namespace, requests: stop.Requests) -> str:
    """Runs to the end and returns a sentence on the outcome."""
    from moe.train.description import read_spec

    spec = read_spec(options.spec)
    from moe.train import corpus, handing, ranks, vocabulary
    from moe.train.batches import Batches
    from moe.train.learner import Learner
    from moe.train.loop import Training

    ranks.set_threads(spec.parallel)
    place = ranks.join(spec.parallel)
    home = Path(os.environ.get("MOELAB_HOME") or PROJECT / "var")
    by_document = spec.data.packing == "documents"
    domains = corpus.load(spec.data, home)
    handing.check_corpus(place, domains)
    batches = Batches(domains, spec.data.seq_len, spec.training.batch_size, spec.seed, by_document=by_document)
    training = Training(spec, Learner(spec, batches, place), options.out, options.attempt, requests)
    try:
        if options.no_resume:
            training.start_over()
        vocabulary.keep(batches.vocabulary, options.out, first_rank=place.is_first)
        if not options.no_resume:
            training.resume()
        training.begin(home)
        end = training.run()
    finally:
        training.close()
    place.leave()
    return f"step {end.step}: loss {end.loss:.4f}, validation loss {end.validation_loss:.4f}"


if __name__ == "__main__":
    exit_code = main(sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    # Not through the interpreter's end: gloo's threads, torn down there beside a rank that has gone already, abort the process at times,
    # and its exit code, which says why the run ended, would be lost.
    os._exit(exit_code)

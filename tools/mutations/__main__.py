"""``python -m mutations``: apply each mutation to a copy of the packages, and check whether its tests fail.

The exit status is 0 if every mutation was caught, and 1 if one was missed, timed out, or could not be applied because
the code has changed. On two cores the whole list takes about an hour.
"""

import argparse
import concurrent.futures
import queue
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from mutations import wan_data, wan_data_at_scale, wan_infer, wan_model, wan_train
from mutations.mutation import PACKAGES, Mutation
from mutations.report import line_of, to_markdown, write
from mutations.tree import Tree, mutate
from mutations.trial import Outcome, control_problem, try_mutation, uncollected_tests

ROOT = Path(__file__).parents[2]
MUTATIONS = (
    *wan_model.MUTATIONS,
    *wan_data.MUTATIONS,
    *wan_data_at_scale.MUTATIONS,
    *wan_train.MUTATIONS,
    *wan_infer.MUTATIONS,
)


def main() -> int:
    """Run the selected mutations and print the outcomes."""
    parser = argparse.ArgumentParser(prog="mutations", description=__doc__.partition("\n")[0])
    parser.add_argument("--only", nargs="+", metavar="NAME", help="run only these mutations")
    parser.add_argument("--package", choices=PACKAGES, help="run only the mutations of one package")
    parser.add_argument("--jobs", type=int, default=1, help="number of parallel runs, each in a copy of its own")
    parser.add_argument("--limit", type=float, default=300.0, metavar="SECONDS", help="timeout of a mutation's tests")
    parser.add_argument("--folder", type=Path, help="folder for the table and the output of the tests")
    parser.add_argument(
        "--check", action="store_true", help="only check that every mutation can be applied and has its tests"
    )
    parser.add_argument("--no-control", action="store_true", help="skip the control runs, which must pass or must fail")
    arguments = parser.parse_args()
    names = [mutation.name for mutation in MUTATIONS]
    assert len(set(names)) == len(names), "every mutation has a name of its own"
    if unknown := sorted(set(arguments.only or ()) - set(names)):
        parser.error(f"there is no mutation {', '.join(unknown)}; the names are {', '.join(names)}")
    chosen = [
        mutation
        for mutation in MUTATIONS
        if (not arguments.only or mutation.name in arguments.only)
        and (not arguments.package or mutation.package == arguments.package)
    ]
    problems = [*stale(ROOT, chosen), *(f"pytest does not find {test}" for test in uncollected_tests(ROOT, chosen))]
    if problems:
        print("\n".join(problems), file=sys.stderr)
    if arguments.check:
        print(f"{len(chosen) - len(problems)} of {len(chosen)} mutations can be applied")
        return 1 if problems else 0
    with tempfile.TemporaryDirectory(prefix="mutations-") as folder:
        trees = [Tree(ROOT, Path(folder) / str(number)) for number in range(max(1, arguments.jobs))]
        for tree in trees:
            tree.check_imports()
        if not arguments.no_control:
            for package in dict.fromkeys(mutation.package for mutation in chosen):
                own = [mutation for mutation in chosen if mutation.package == package]
                if problem := control_problem(trees[0], package, own, arguments.limit):
                    print(problem, file=sys.stderr)
                    return 1
                print(f"control   {package} passes as it is", flush=True)
        outcomes = list(run_all(trees, chosen, arguments.limit))
    if arguments.folder is not None:
        write(outcomes, arguments.folder)
    print(f"\n{to_markdown(outcomes)}")
    return 0 if all(outcome.verdict == "caught" for outcome in outcomes) else 1


def stale(root: Path, mutations: Sequence[Mutation]) -> Iterator[str]:
    """One sentence for each mutation that cannot be applied to the current code."""
    for mutation in mutations:
        try:
            mutate(root, mutation)
        except ValueError as error:
            yield str(error)


def run_all(trees: Sequence[Tree], mutations: Sequence[Mutation], limit: float) -> Iterator[Outcome]:
    """The outcome of each mutation, in order; each is printed when it is known."""
    idle: queue.SimpleQueue[Tree] = queue.SimpleQueue()
    for tree in trees:
        idle.put(tree)

    def run(mutation: Mutation) -> Outcome:
        tree = idle.get()
        try:
            outcome = try_mutation(tree, mutation, limit)
        finally:
            idle.put(tree)
        print(line_of(outcome), flush=True)
        return outcome

    with concurrent.futures.ThreadPoolExecutor(len(trees)) as pool:
        yield from pool.map(run, mutations)


if __name__ == "__main__":
    sys.exit(main())

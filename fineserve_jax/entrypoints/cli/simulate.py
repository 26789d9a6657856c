"""`fineserve-jax simulate`: this engine's scheduler, and others' rules, on devices that need not be there."""

from fineserve_jax.entrypoints.cli.simulate_flags import ReportFlags, ServingFlags, StepTimeFlags, WorkloadFlags


def simulate(*, workload: WorkloadFlags, serving: ServingFlags, step_times: StepTimeFlags, report: ReportFlags) -> None:
    """Replay a workload on a virtual clock, at the scale of devices that need not be there.

    Scheduler, memory pools and policies are the engine's own; steps take as long as a cost model says: the
    device's roofline, a table of measured latencies (--table), or a step profile that an engine has saved
    (--step-profile). The same seed gives the same results to the byte.
    """
    from fineserve_jax.entrypoints.cli.run_simulation import (
        run_simulation,  # here, so that --help need not wait for SciPy
    )

    run_simulation(workload, serving, step_times, report)

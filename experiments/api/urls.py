"""The routes of the API. Each needs its row in `experiments.routes`."""

from __future__ import annotations

from django.urls import path, re_path

from experiments.api import (
    account,
    generations,
    history,
    import_config,
    presets,
    projects,
    run,
    runs,
    schema,
    telemetry,
    tokens,
    verbs,
    worker_generations,
    workers,
)
from experiments.pages import docs

urlpatterns = [
    path("runs", runs.Runs.as_view()),
    path("runs/validate", runs.Validate.as_view()),
    path("runs/record", runs.Record.as_view()),
    path("runs/bulk", runs.Bulk.as_view()),
    path("runs/<int:run_id>", run.OneRun.as_view()),
    path("runs/<int:run_id>/cancel", verbs.Cancel.as_view()),
    path("runs/<int:run_id>/pause", verbs.Pause.as_view()),
    path("runs/<int:run_id>/resume", verbs.Resume.as_view()),
    path("runs/<int:run_id>/checkpoint", verbs.Checkpoint.as_view()),
    path("runs/<int:run_id>/restart", verbs.Restart.as_view()),
    path("runs/<int:run_id>/clone", verbs.Clone.as_view()),
    path("runs/<int:run_id>/transitions", history.Transitions.as_view()),
    path("runs/<int:run_id>/nodes", history.Nodes.as_view()),
    path("runs/<int:run_id>/checkpoints", history.Checkpoints.as_view()),
    path("runs/<int:run_id>/diff", history.Diff.as_view()),
    path("runs/<int:run_id>/generations", generations.Generations.as_view()),
    path("runs/<int:run_id>/generations/<int:generation_id>", generations.OneGeneration.as_view()),
    *telemetry.urlpatterns,
    path("presets", presets.Presets.as_view()),
    path("presets/<str:name>", presets.OnePreset.as_view()),
    path("price", presets.PriceOf.as_view()),
    path("specs/dense-baseline", presets.DenseBaseline.as_view()),
    path("import-config", import_config.ImportConfig.as_view()),
    path("schema", schema.OpenApi.as_view()),
    path("schema/spec", presets.SpecSchema.as_view()),
    path("workers", workers.Workers.as_view()),
    path("workers/<int:worker_id>/release", workers.Release.as_view()),
    path("worker/hello", workers.Hello.as_view()),
    path("worker/claim", workers.ClaimWork.as_view()),
    path("worker/generations/claim", worker_generations.ClaimGeneration.as_view()),
    path("worker/generations/<int:generation_id>/heartbeat", worker_generations.Heartbeat.as_view()),
    path("worker/generations/<int:generation_id>/answer", worker_generations.Answer.as_view()),
    path("projects", projects.Projects.as_view()),
    path("projects/<int:project_id>/members", projects.Members.as_view()),
    path("projects/<int:project_id>/members/<int:user_id>", projects.OneMember.as_view()),
    path("tokens", tokens.Tokens.as_view()),
    path("tokens/<int:token_id>", tokens.OneToken.as_view()),
    path("me", account.Me.as_view()),
    path("system", account.SystemState.as_view()),
    path("docs", docs.reference, name="api-docs"),
    re_path(r"^[\s\S]*\Z", schema.Nowhere.as_view()),  # `<path:…>` would not match a path with a line break.
]

"""The pages' addresses; who may open them stands in `experiments.routes`."""

from __future__ import annotations

from django.urls import path

from experiments.pages import compare, generate, methods, new, preset, run, runs, sign_in, tokens, workers

urlpatterns = [
    path("", runs.home, name="home"),
    path("login", sign_in.login, name="login"),
    path("login/ticket/<str:ticket>", sign_in.ticket, name="sign-in-ticket"),
    path("logout", sign_in.logout, name="logout"),
    path("runs", runs.listing, name="runs"),
    path("runs/new", new.new, name="new-run"),
    path("runs/compare", compare.compare, name="compare"),
    path("runs/<int:run_id>", run.detail, name="run"),
    path("runs/<int:run_id>/", run.detail),
    path("runs/<int:run_id>/generate", generate.generate, name="generate"),
    path("runs/<int:run_id>/row", runs.row, name="run-row"),
    path("runs/<int:run_id>/panel/<str:panel>", run.panel, name="run-panel"),
    path("presets", preset.listing, name="presets"),
    path("presets/<str:name>", preset.detail, name="preset"),
    path("methods", methods.listing, name="methods"),
    path("workers", workers.listing, name="workers"),
    path("tokens", tokens.listing, name="tokens"),
]

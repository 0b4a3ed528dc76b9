"""Everything that answers HTTP: the API, the pages, and the two health checks."""

from django.urls import include, path

handler500 = "experiments.pages.broken.broken"
urlpatterns = [
    path("api/v1/", include("experiments.api.urls")),
    path("", include("experiments.health")),
    path("", include("experiments.pages.urls")),
]

"""Django's settings. Every variable that is read here is listed in README.md."""

from __future__ import annotations

from psycopg.conninfo import conninfo_to_dict

from moelab import environment as env
from moelab.redis_url import celery_broker

MOELAB_HOME = env.home()
MOELAB_MAX_PARAMS = int(env.number("MOELAB_MAX_PARAMS", 2e9))
MOELAB_PUBLIC_URL = env.text("MOELAB_PUBLIC_URL", "http://127.0.0.1:8000").rstrip("/")

DEBUG = env.flag("MOELAB_DEBUG")
SECRET_KEY = env.secret_key()
ALLOWED_HOSTS = env.listed("MOELAB_ALLOWED_HOSTS", "127.0.0.1,localhost,[::1]")
CSRF_TRUSTED_ORIGINS = [MOELAB_PUBLIC_URL]

INSTALLED_APPS = [
    "django.contrib.auth",
    "django.contrib.contenttypes",
    "django.contrib.sessions",
    "django.contrib.messages",
    "django.contrib.staticfiles",
    "channels",
    "rest_framework",
    "django_filters",
    "drf_spectacular",
    "experiments",
]

MIDDLEWARE = [
    "django.middleware.security.SecurityMiddleware",
    "whitenoise.middleware.WhiteNoiseMiddleware",
    "experiments.pages.csp.ContentSecurityPolicy",
    "django.contrib.sessions.middleware.SessionMiddleware",
    "django.middleware.common.CommonMiddleware",
    "django.middleware.csrf.CsrfViewMiddleware",
    "django.contrib.auth.middleware.AuthenticationMiddleware",
    "experiments.closed.ClosedByDefault",
    "django.contrib.messages.middleware.MessageMiddleware",
    "django.middleware.clickjacking.XFrameOptionsMiddleware",
]

ROOT_URLCONF = "moelab.urls"
ASGI_APPLICATION = "moelab.asgi.application"
TEMPLATES = [
    {
        "BACKEND": "django.template.backends.django.DjangoTemplates",
        "APP_DIRS": True,
        "OPTIONS": {
            "context_processors": [
                "django.template.context_processors.request",
                "django.contrib.auth.context_processors.auth",
                "django.contrib.messages.context_processors.messages",
            ]
        },
    }
]


def database(url: str) -> dict[str, object]:
    """Django's description of the database at a libpq URL; the pool gives each request a connection that has just answered."""
    parts = conninfo_to_dict(url)
    return {
        "ENGINE": "django.db.backends.postgresql",
        "NAME": parts.pop("dbname", "moelab"),
        "USER": parts.pop("user", ""),
        "PASSWORD": parts.pop("password", ""),
        "HOST": parts.pop("host", ""),
        "PORT": parts.pop("port", ""),
        "CONN_HEALTH_CHECKS": True,
        "OPTIONS": {"pool": {"min_size": 1, "max_size": 40, "timeout": 10}, "connect_timeout": 5, **parts},
    }


DATABASES = {"default": database(env.text("DATABASE_URL", "postgresql://moelab@/moelab"))}
REDIS_URL = env.text("REDIS_URL", "redis://127.0.0.1:6379/0")
CELERY_BROKER_URL = celery_broker(REDIS_URL)

DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"
AUTH_PASSWORD_VALIDATORS = [
    {"NAME": "django.contrib.auth.password_validation.MinimumLengthValidator", "OPTIONS": {"min_length": 10}},
    {"NAME": "django.contrib.auth.password_validation.CommonPasswordValidator"},
    {"NAME": "django.contrib.auth.password_validation.UserAttributeSimilarityValidator"},
]
LOGIN_URL = "login"
LOGIN_REDIRECT_URL = "/"
LOGOUT_REDIRECT_URL = "login"

USE_TZ = True
TIME_ZONE = "UTC"
LANGUAGE_CODE = "en"
USE_I18N = False

STATIC_URL = "/static/"
STATICFILES_DIRS = [path for path in [env.PROJECT / "frontend" / "dist"] if path.exists()]
VITE_MANIFEST = env.PROJECT / "frontend" / "dist" / ".vite" / "manifest.json"
WHITENOISE_USE_FINDERS = True
# Vite puts a content hash in every file name under assets/: those may be cached for ever.
WHITENOISE_IMMUTABLE_FILE_TEST = r"/assets/.+-[\w-]{8,}\.\w+$"

# Refused before anything is parsed; the API's own parser is stricter (experiments.api.parsers).
DATA_UPLOAD_MAX_MEMORY_SIZE = 1_000_000
DATA_UPLOAD_MAX_NUMBER_FIELDS = 2_000

HTTPS = MOELAB_PUBLIC_URL.startswith("https://")
SESSION_COOKIE_SECURE = CSRF_COOKIE_SECURE = SECURE_SSL_REDIRECT = HTTPS
SECURE_HSTS_SECONDS = 31_536_000 if HTTPS else 0
SECURE_PROXY_SSL_HEADER = ("HTTP_X_FORWARDED_PROTO", "https") if env.flag("MOELAB_BEHIND_PROXY") else None
SESSION_COOKIE_SAMESITE = CSRF_COOKIE_SAMESITE = "Lax"
SECURE_CONTENT_TYPE_NOSNIFF = True
SECURE_REFERRER_POLICY = "same-origin"
X_FRAME_OPTIONS = "DENY"

REST_FRAMEWORK = {
    "DEFAULT_AUTHENTICATION_CLASSES": ["experiments.api.auth.BearerAuthentication", "experiments.api.auth.SessionAuthentication"],
    "DEFAULT_PERMISSION_CLASSES": ["experiments.api.permissions.ByTable"],
    "DEFAULT_PARSER_CLASSES": ["experiments.api.parsers.StrictJSONParser"],
    "DEFAULT_RENDERER_CLASSES": ["rest_framework.renderers.JSONRenderer"],
    "DEFAULT_SCHEMA_CLASS": "drf_spectacular.openapi.AutoSchema",
    "EXCEPTION_HANDLER": "experiments.api.problems.handle",
    "TEST_REQUEST_DEFAULT_FORMAT": "json",
}
SPECTACULAR_SETTINGS = {
    "TITLE": "moelab",
    "DESCRIPTION": "Launch, watch and inspect Mixture-of-Experts training.\n\n"
    "Every error is `application/problem+json` (RFC 9457). `detail` is never empty: it says what was asked for and what there is. "
    "`errors` names what is at fault in the request: a field of the body by JSON pointer, a parameter, or a header. "
    "It is empty where the request is well formed and the server's state decides, as for 404, 405 and 409.",
    "VERSION": "1",
    "OAS_VERSION": "3.1.1",
    "SERVE_INCLUDE_SCHEMA": False,
}

LOGGING = {
    "version": 1,
    "disable_existing_loggers": False,
    "formatters": {"line": {"format": "%(asctime)s %(levelname)s %(name)s: %(message)s"}},
    "handlers": {"console": {"class": "logging.StreamHandler", "formatter": "line"}},
    "root": {"handlers": ["console"], "level": "INFO"},
    "loggers": {"django.request": {"level": "ERROR"}, "httpx": {"level": "WARNING"}},
}

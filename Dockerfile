# Two images from one file: `web` (pages, API, beat; no torch) and `worker` (the trainer, with CUDA's libraries).

FROM node:22-slim AS frontend
WORKDIR /app/frontend
COPY frontend/package.json frontend/package-lock.json ./
RUN npm ci --no-audit --no-fund
COPY frontend/ ./
RUN npm run build

FROM python:3.11-slim AS web
ENV PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1 PIP_NO_CACHE_DIR=1 MOELAB_HOME=/data
WORKDIR /app
RUN useradd --uid 10001 --create-home moelab && mkdir /data && chown moelab /data
COPY pyproject.toml constraints.txt README.md manage.py ./
COPY spec spec
COPY kernels kernels
COPY moe moe
COPY workers workers
COPY experiments experiments
COPY moelab moelab
COPY benchmarks benchmarks
RUN pip install -c constraints.txt -e .
COPY --from=frontend /app/frontend/dist frontend/dist
USER moelab
VOLUME /data
EXPOSE 8000

FROM web AS worker
USER root
# Triton compiles its launchers with a C compiler.
RUN apt-get update && apt-get install --yes --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*
RUN pip install -c constraints.txt -e '.[train,gpu]'
USER moelab

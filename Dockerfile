# This file builds three images: cpu (pipeline steps that need no GPU, data versions, rollouts), serve (the transformer
# and the model server) and cuda (steps on GPUs, TrainJobs, vLLM).
#
#   docker build --target cpu --tag clincot-cpu .
#
# locks/ pins every package with the hashes of its files, except torch of cpu and serve (scripts/image/torch.sh) and the
# tools that pip itself calls to build a package (constraints.txt). The images run as uid 10001 and write only below
# /tmp, so a container with a read-only root needs a volume there. A private package index and its certificate are
# passed as build secrets, which leave no trace in the image (that pip.conf contains: cert = /run/secrets/pip_cert):
#
#   docker build --secret id=pip_conf,src=pip.conf --secret id=pip_cert,src=ca.pem --target cpu .
#
# The base needs apt and python3.11 with venv. An image is only as reproducible as its base, so pin the base by digest
# in production.
ARG BASE_IMAGE=docker.io/library/python:3.11-slim-bookworm

# ---- base of all three images: the user, and the folders to which it may write
FROM ${BASE_IMAGE} AS base
RUN groupadd --gid 10001 clincot \
 && useradd --uid 10001 --gid 10001 --no-log-init --no-create-home --home-dir /tmp --shell /usr/sbin/nologin clincot
# hadolint takes TOKENIZERS_PARALLELISM for a secret.
# hadolint ignore=DL3064
ENV PATH=/opt/venv/bin:$PATH \
    HOME=/tmp \
    TMPDIR=/tmp \
    XDG_CACHE_HOME=/tmp/.cache \
    HF_HOME=/tmp/.cache/huggingface \
    MPLCONFIGDIR=/tmp/.cache/matplotlib \
    DVC_SITE_CACHE_DIR=/tmp/.cache/dvc \
    CLINCOT_CACHE=/tmp/.cache/clincot \
    DVC_NO_ANALYTICS=1 \
    HF_HUB_DISABLE_TELEMETRY=1 \
    TOKENIZERS_PARALLELISM=false \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1

# ---- tools that are not in the images (pip, setuptools, the SBOM generator), and an environment without pip
FROM base AS tools
ENV PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_ROOT_USER_ACTION=ignore \
    PIP_CONSTRAINT=/build/constraints.txt
WORKDIR /build
COPY constraints.txt locks/tools.txt ./
RUN --mount=type=secret,id=pip_conf,target=/etc/pip.conf \
    --mount=type=secret,id=pip_cert,target=/run/secrets/pip_cert \
    python3.11 -m venv /opt/tools \
 && /opt/tools/bin/pip install --quiet --no-deps --require-hashes --requirement tools.txt \
 && python3.11 -m venv --without-pip /opt/venv

# ---- dependencies: layers that a change of the source does not rebuild; cpu and serve share the first one
FROM tools AS dependencies
# PyPI's torch for Linux is the CUDA build, so it comes from the index of the CPU build. If TORCH_INDEX is empty, pip's
# own index is used; if TORCH_BUILD is empty, any build is accepted.
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
ARG TORCH_BUILD=cpu
COPY scripts/image/torch.sh scripts/image/torch_build.py ./
RUN --mount=type=secret,id=pip_conf,target=/etc/pip.conf \
    --mount=type=secret,id=pip_cert,target=/run/secrets/pip_cert \
    ./torch.sh
COPY locks/base.txt scripts/image/dependencies.sh scripts/image/bytecode.sh ./
RUN --mount=type=secret,id=pip_conf,target=/etc/pip.conf \
    --mount=type=secret,id=pip_cert,target=/run/secrets/pip_cert \
    ./dependencies.sh base.txt

FROM dependencies AS cluster-dependencies
COPY locks/cpu.txt ./
RUN --mount=type=secret,id=pip_conf,target=/etc/pip.conf \
    --mount=type=secret,id=pip_cert,target=/run/secrets/pip_cert \
    ./dependencies.sh cpu.txt

FROM dependencies AS serve-dependencies
COPY locks/serve.txt ./
RUN --mount=type=secret,id=pip_conf,target=/etc/pip.conf \
    --mount=type=secret,id=pip_cert,target=/run/secrets/pip_cert \
    ./dependencies.sh serve.txt

FROM tools AS cuda-dependencies
COPY requirements-cuda.txt locks/cuda.txt scripts/image/bytecode.sh scripts/image/torch_build.py ./
# The lock is complete, with torch's CUDA build from PyPI, hence --no-deps. This torch needs a driver for CUDA 13: 580 or
# later.
RUN --mount=type=secret,id=pip_conf,target=/etc/pip.conf \
    --mount=type=secret,id=pip_cert,target=/run/secrets/pip_cert \
    PIP_CONSTRAINT=/build/requirements-cuda.txt /opt/tools/bin/pip --python /opt/venv/bin/python install --quiet \
      --no-compile --no-deps --require-hashes --requirement cuda.txt \
 && /opt/venv/bin/python torch_build.py cuda \
 && ./bytecode.sh /opt/venv

# ---- the project: one wheel, the files that it adds to each environment, and the SBOM of the whole image
FROM tools AS wheel
COPY . /source
RUN /opt/tools/bin/pip wheel --quiet --no-index --no-deps --no-build-isolation --wheel-dir /wheel /source

FROM cluster-dependencies AS cpu-project
ARG VERSION=0.1.0
COPY --from=wheel /wheel /wheel
COPY pyproject.toml scripts/image/project.sh ./
RUN ./project.sh "$VERSION"

FROM serve-dependencies AS serve-project
ARG VERSION=0.1.0
COPY --from=wheel /wheel /wheel
COPY pyproject.toml scripts/image/project.sh ./
RUN ./project.sh "$VERSION"

FROM cuda-dependencies AS cuda-project
ARG VERSION=0.1.0
COPY --from=wheel /wheel /wheel
COPY pyproject.toml scripts/image/project.sh ./
RUN ./project.sh "$VERSION"

# ---- the part that cpu and serve share
FROM base AS common
# The base determines the Debian release, so these packages cannot be pinned here.
# hadolint ignore=DL3008
RUN apt-get update \
 && apt-get install --yes --no-install-recommends ca-certificates \
 && rm -rf /var/lib/apt/lists/* /var/cache/apt /var/cache/debconf /var/log/apt /var/log/dpkg.log
COPY --from=dependencies /opt/venv /opt/venv

# ---- cpu
FROM common AS cpu
# hadolint ignore=DL3008
RUN apt-get update \
 && apt-get install --yes --no-install-recommends git \
 && rm -rf /var/lib/apt/lists/* /var/cache/apt /var/cache/debconf /var/log/apt /var/log/dpkg.log
COPY --from=cluster-dependencies /added /
COPY params.yaml /app/
COPY assets /app/assets
COPY --from=cpu-project /project /
ARG VERSION=0.1.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="clincot-cpu" \
      org.opencontainers.image.description="ClinCoT: pipeline steps that need no GPU, data versions, rollouts" \
      org.opencontainers.image.version="$VERSION" \
      org.opencontainers.image.revision="$REVISION" \
      org.opencontainers.image.licenses="Apache-2.0" \
      io.clincot.sbom="/opt/venv/share/sbom/clincot.cdx.json"
WORKDIR /app
USER 10001:10001
ENTRYPOINT ["clincot"]
CMD ["--help"]

# ---- serve
FROM common AS serve
COPY --from=serve-dependencies /added /
COPY params.yaml /app/
COPY assets /app/assets
COPY --from=serve-project /project /
ARG VERSION=0.1.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="clincot-serve" \
      org.opencontainers.image.description="ClinCoT: the model server, and the transformer before a predictor" \
      org.opencontainers.image.version="$VERSION" \
      org.opencontainers.image.revision="$REVISION" \
      org.opencontainers.image.licenses="Apache-2.0" \
      io.clincot.sbom="/opt/venv/share/sbom/clincot.cdx.json"
WORKDIR /app
USER 10001:10001
EXPOSE 8080
ENTRYPOINT ["clincot"]
CMD ["serve", "--help"]

# ---- cuda
FROM base AS cuda
# This image keeps a C compiler, because Triton, which torch and vLLM use, compiles its launchers when a kernel first
# runs. Triton also needs Python.h of this very Python, so the base must have it (docker.io/library/python does).
# hadolint ignore=DL3008
RUN apt-get update \
 && apt-get install --yes --no-install-recommends ca-certificates gcc git libc6-dev \
 && rm -rf /var/lib/apt/lists/* /var/cache/apt /var/cache/debconf /var/log/apt /var/log/dpkg.log \
 && test -f "$(python3.11 -c 'import sysconfig; print(sysconfig.get_paths()["include"])')/Python.h"
COPY --from=cuda-dependencies /opt/venv /opt/venv
COPY params.yaml /app/
COPY assets /app/assets
COPY --from=cuda-project /project /
ENV VLLM_NO_USAGE_STATS=1 \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
ARG VERSION=0.1.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="clincot-cuda" \
      org.opencontainers.image.description="ClinCoT: pipeline steps on GPUs, distributed training, vLLM" \
      org.opencontainers.image.version="$VERSION" \
      org.opencontainers.image.revision="$REVISION" \
      org.opencontainers.image.licenses="Apache-2.0" \
      io.clincot.sbom="/opt/venv/share/sbom/clincot.cdx.json"
WORKDIR /app
USER 10001:10001
ENTRYPOINT ["clincot"]
CMD ["--help"]

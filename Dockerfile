# The service with its demo model: one file for both devices.
#   docker build -t megatron-gpt2 .                               for CPUs
#   docker build -t megatron-gpt2:gpu --build-arg DEVICE=gpu .    for NVIDIA GPUs: torch for CUDA, and a C compiler
# Other models come by volume, as folders under /models or in the hub's cache under /cache.
# A digest pins the base for good: --build-arg PYTHON_IMAGE=python:3.12-slim-bookworm@sha256:<digest>
ARG PYTHON_IMAGE=python:3.12-slim-bookworm
ARG DEVICE=cpu

FROM ${PYTHON_IMAGE} AS build
ARG DEVICE
# PyPI's torch is for CUDA, and gigabytes larger than the one of this index. Empty: look nowhere else.
ARG TORCH_CPU_INDEX=https://download.pytorch.org/whl/cpu
# pip reads this by itself: a folder of wheels that the builder mounts.
ARG PIP_FIND_LINKS=
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
# pip stays in this stage: what the image serves has no use for it.
RUN python3 -m venv /opt/pip && python3 -m venv --without-pip /opt/venv
WORKDIR /src
# Dependencies before source: a change of code does not install torch again. The lock pins what pyproject.toml asks for.
# torch's headers, tests and tools are 0.2 GB that nothing opens; Triton brings headers of its own.
COPY pyproject.toml requirements.lock ./
RUN case "$DEVICE" in \
        cpu) export PIP_EXTRA_INDEX_URL="$TORCH_CPU_INDEX" ;; \
        gpu) ;; \
        *) echo "DEVICE: cpu or gpu, not '$DEVICE'" >&2; exit 1 ;; \
    esac \
    && python3 -c "import tomllib; about = tomllib.load(open('pyproject.toml', 'rb'))['project']; print(*about['dependencies'], *about['optional-dependencies']['otel'], sep='\n')" > dependencies.txt \
    && /opt/pip/bin/pip --python /opt/venv/bin/python install -r dependencies.txt -c requirements.lock \
    && find /opt/venv/lib/python3*/site-packages/torch \
        \( -path '*/torch/include/*' -o -path '*/torch/test/*' -o -path '*/torch/bin/*' ! -name torch_shm_manager \) -delete
COPY README.md LICENSE THIRD_PARTY_NOTICES.md ./
COPY service service
# Beside the dependencies, so that the service is a layer of its own: a change of code does not move torch again.
RUN /opt/pip/bin/pip --python /opt/venv/bin/python install --no-deps --root /opt/service .

FROM ${PYTHON_IMAGE}
ARG PYTHON_IMAGE
ARG DEVICE
# Triton builds what launches a kernel with a C compiler, once; without one the GPU runs plain operators.
# hadolint ignore=DL3008
RUN if [ "$DEVICE" = gpu ]; then \
        apt-get update && apt-get install --no-install-recommends --yes gcc libc6-dev && rm -rf /var/lib/apt/lists/*; \
    fi
COPY --from=build /opt/venv /opt/venv
COPY --from=build /opt/service/opt/venv /opt/venv
# All that is ever written goes to /cache, so the root may be read-only. Group 0 may write there: some clusters run
# images under a random user of that group. Models are fetched by plain HTTP, as the tests fetch them: xet, which
# huggingface_hub brings, asks other hosts than the hub or its mirror. And the hub is asked for nothing but the model.
RUN install -d -m 0775 -o 10001 -g 0 /cache && install -d /models
ENV PATH=/opt/venv/bin:$PATH \
    HOME=/cache \
    TMPDIR=/cache \
    XDG_CACHE_HOME=/cache \
    HF_HOME=/cache/huggingface \
    HF_HUB_DISABLE_XET=1 \
    HF_HUB_DISABLE_TELEMETRY=1 \
    TORCHINDUCTOR_CACHE_DIR=/cache/torchinductor \
    TRITON_CACHE_DIR=/cache/kernels \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    MGPT_HOST=0.0.0.0
VOLUME ["/cache"]
# By number, so that an orchestrator can see that it is not root.
USER 10001:0
EXPOSE 8000
# Alive, not ready: what is unhealthy may be killed, and a model that is still loading must not be.
# http.client, as urllib would ask the proxy that Docker may have put into the environment.
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s --retries=3 \
    CMD ["python3", "-c", "import http.client as h; c = h.HTTPConnection('127.0.0.1', 8000, timeout=4); c.request('GET', '/livez'); raise SystemExit(c.getresponse().status != 200)"]
ENTRYPOINT ["megatron-gpt2"]
CMD ["serve"]
# Last, so that a new revision costs no layer its place in the cache.
ARG REVISION=
LABEL org.opencontainers.image.title="megatron-gpt2" \
      org.opencontainers.image.description="MegatronGPT2 345M over HTTP, with its demo model" \
      org.opencontainers.image.version="0.1.0" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.licenses="Apache-2.0 AND MIT AND BSD-3-Clause" \
      org.opencontainers.image.base.name="${PYTHON_IMAGE}"

# fastuft on a CPU: docker build -f docker/cpu.Dockerfile -t fastuft:cpu .
#                   docker run --rm -v "$PWD/runs:/home/user/runs" fastuft:cpu demo
FROM python:3.12-slim-bookworm AS build
WORKDIR /src
COPY . .
# A compiler is needed here alone; the wheel that it builds goes into the image below.
# hadolint ignore=DL3008
RUN apt-get update && apt-get install -y --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*
RUN pip install --no-cache-dir --index-url https://download.pytorch.org/whl/cpu torch==2.13.0 \
    && pip install --no-cache-dir setuptools==84.2.1 wheel==0.48.0 cmake==4.4.5 ninja==1.13.2 \
    && FASTUFT_BUILD=cpu pip wheel --no-cache-dir --no-build-isolation --no-deps --wheel-dir /wheels .

FROM python:3.12-slim-bookworm
COPY --from=build /wheels /wheels
COPY constraints.txt /constraints.txt
RUN pip install --no-cache-dir --index-url https://download.pytorch.org/whl/cpu torch==2.13.0 \
    && pip install --no-cache-dir --constraint /constraints.txt "fastuft[train-cpu] @ file://$(ls /wheels/*.whl)" \
    && useradd --create-home --uid 1000 user
USER 1000
WORKDIR /home/user
ENTRYPOINT ["fastuft"]
CMD ["help"]

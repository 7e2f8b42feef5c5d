# effv2 with the drivers of a server: docs/compose.yaml uses it for the MLflow server and for workers.
#   docker build -t effv2 . && docker run --rm -v "$PWD:/work" effv2 ablate --study ablate-digits
FROM python:3.12-slim
# git: runs record the commit of the checkout. g++: training on a CPU compiles its batch norm (docs/performance.md).
RUN apt-get update && apt-get install -y --no-install-recommends g++ git && rm -rf /var/lib/apt/lists/*
WORKDIR /effv2
COPY . .
RUN pip install --no-cache-dir -e '.[postgresql]' 'mlflow[auth]'
WORKDIR /work
ENTRYPOINT ["effv2"]
CMD ["--help"]

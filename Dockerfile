# effv2 with the drivers for servers. docs/compose.yaml uses this image for the MLflow server and for workers.
#   docker build -t effv2 . && docker run --rm -v "$PWD:/work" effv2 ablate --study ablate-digits
FROM python:3.12-slim
# Runs record the commit of the checkout with git. Training on a CPU compiles its batch norm with g++.
RUN apt-get update && apt-get install -y --no-install-recommends g++ git && rm -rf /var/lib/apt/lists/*
WORKDIR /effv2
COPY . .
RUN pip install --no-cache-dir -e '.[postgresql]' 'mlflow[auth]'
WORKDIR /work
ENTRYPOINT ["effv2"]
CMD ["--help"]

#!/bin/sh
# Installs the peers into DIR: a Python environment with ONNX Runtime (its WebGPU build), and ggml's libraries as
# prebuilt for llama.cpp: 280 MB on disk, 20 s to some minutes. With --torch also PyTorch and transformers: 5.8 GB on
# disk (PyTorch's wheel for Linux brings libraries for GPUs along), some minutes. What is there already stays.
#
#   setup.sh DIR [--torch]
#
# Needs python3 with venv, npm, and Linux on x86-64. SwiftShader comes with Debian's and Ubuntu's package chromium.
set -eu
dir= torch=no
for argument in "$@"; do
    case "$argument" in
        --torch) torch=yes ;;
        -*) sed -n '2,8s/^# \{0,1\}//p' "$0"; exit 2 ;;
        *) dir=$argument ;;
    esac
done
[ -n "$dir" ] || { echo "usage: setup.sh DIR [--torch]" >&2; exit 2; }

ggml=3.22.1
mkdir -p "$dir" && cd "$dir"
[ -x venv/bin/pip ] || python3 -m venv venv
venv/bin/pip -q install 'numpy<3' 'onnx==1.23.2' 'onnxruntime-webgpu==1.27.0'
[ "$torch" = no ] || venv/bin/pip -q install 'numpy<3' 'torch==2.15.0' 'transformers==5.24.0'
if [ "$(cat ggml/package-version 2>/dev/null)" != "$ggml" ]; then
    rm -rf ggml package
    npm pack --silent "@node-llama-cpp/linux-x64-vulkan@$ggml" >/dev/null
    tar xzf "node-llama-cpp-linux-x64-vulkan-$ggml.tgz" && rm "node-llama-cpp-linux-x64-vulkan-$ggml.tgz"
    mv package/bins/linux-x64-vulkan ggml && rm -r package
    echo "$ggml" >ggml/package-version
fi
echo "peers ready in $dir"

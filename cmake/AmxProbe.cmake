# Some virtual machines name AMX among their CPU's features and then fault at the first tile instruction. A build with
# -march=native would die there, so AMX stays only where a real tile multiplication runs here and now.

include(CheckCSourceCompiles)

# Sets OUT to the flags that take AMX away from -march=native; empty where it works, or was never there.
function(st3_probe_amx OUT)
    set(${OUT} "" PARENT_SCOPE)
    if(MSVC OR NOT GGML_NATIVE)
        return()
    endif()

    set(CMAKE_REQUIRED_FLAGS -march=native)
    check_c_source_compiles("
        #ifndef __AMX_TILE__
        #error no AMX
        #endif
        int main(void) { return 0; }" ST3_AMX_CLAIMED)
    if(NOT ST3_AMX_CLAIMED)
        return()
    endif()

    if(NOT CMAKE_CROSSCOMPILING AND NOT DEFINED ST3_AMX_EXIT)
        try_run(ST3_AMX_EXIT ST3_AMX_COMPILED
            ${CMAKE_CURRENT_BINARY_DIR}/amx_probe ${CMAKE_CURRENT_FUNCTION_LIST_DIR}/amx_probe.c
            COMPILE_DEFINITIONS -march=native)
    endif()
    if("${ST3_AMX_EXIT}" STREQUAL "0")
        message(STATUS "AMX: works")
    else()
        message(STATUS "AMX: named by the CPU, but does not run here; left out")
        set(${OUT} -mno-amx-tile -mno-amx-int8 -mno-amx-bf16 PARENT_SCOPE)
    endif()
endfunction()

# Upstream's GPU backends compile the kernels that lie in their folders, each in its own way. Ours join them there.

# OUT: upstream's ggml/src
function(st3_put_kernels OUT)
    get_filename_component(native ${CMAKE_CURRENT_FUNCTION_LIST_DIR}/../native/ggml ABSOLUTE)

    # CUDA, and HIP and MUSA, which take CUDA's files
    file(CONFIGURE OUTPUT ${OUT}/ggml-cuda/attn-span.cu CONTENT "#include \"${native}/attn-span.cu\"\n" @ONLY)

    # Metal's text is compiled on the user's machine and can include nothing of ours: it gets the headers' text.
    file(READ ${native}/attn-span.metal text)
    foreach(header attn-span-kernel.h attn-span-args.h) # the first includes the second
        file(READ ${native}/${header} content)
        string(REPLACE "#pragma once" "" content "${content}")
        string(REPLACE "#include \"${header}\"" "${content}" text "${text}")
    endforeach()
    file(CONFIGURE OUTPUT ${OUT}/ggml-metal/kernels/attn_span.metal CONTENT "${text}" @ONLY)
    set_property(DIRECTORY APPEND PROPERTY CMAKE_CONFIGURE_DEPENDS
        ${native}/attn-span.metal ${native}/attn-span-kernel.h ${native}/attn-span-args.h)
endfunction()

if(CMAKE_SCRIPT_MODE_FILE) # cmake -DOUT=... -P
    st3_put_kernels(${OUT})
endif()

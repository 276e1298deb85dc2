// own-folder.h - where ggml's own library is, in UTF-8. Included by ggml-backend-reg.cpp (vendor/patches/0031).
#pragma once

#include <filesystem>
#include <string>

#ifdef _WIN32
#ifndef NOMINMAX
#define NOMINMAX
#endif
#include <windows.h>
#else
#include <dlfcn.h>
#endif

// "." where the system does not say. The pointer is valid for good.
inline const char * ggml_own_folder() {
    static const std::string folder = [] {
        static const char     here = 0;
        std::filesystem::path library;
#ifdef _WIN32
        HMODULE module = nullptr;
        wchar_t path[32768];
        if (GetModuleHandleExW(
                    GET_MODULE_HANDLE_EX_FLAG_FROM_ADDRESS | GET_MODULE_HANDLE_EX_FLAG_UNCHANGED_REFCOUNT,
                    reinterpret_cast<const wchar_t *>(&here), &module)) {
            library = std::wstring(path, GetModuleFileNameW(module, path, 32768));
        }
#else
        Dl_info info;
        if (dladdr(&here, &info) && info.dli_fname) {
            library = info.dli_fname;
        }
#endif
        return library.has_parent_path() ? library.parent_path().u8string() : std::string(".");
    }();

    return folder.c_str();
}

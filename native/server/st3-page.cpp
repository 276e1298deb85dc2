#include "st3-page.h"

#include "st3-page-files.h"

#include <cpp-httplib/httplib.h>

// Nothing from elsewhere, nothing inline; pictures are data: URLs.
static constexpr const char * POLICY =
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'";

struct page_file {
    const char * path;
    const char * type;
    const char * text;
};

static constexpr page_file FILES[] = {
    {"/st3",      "text/html; charset=utf-8",       ST3_PAGE_HTML},
    { "/st3.css", "text/css; charset=utf-8",        ST3_PAGE_CSS },
    { "/st3.js",  "text/javascript; charset=utf-8", ST3_PAGE_JS  },
};

const std::vector<std::string> & st3_page_paths() {
    static const std::vector<std::string> paths = [] {
        std::vector<std::string> res;
        for (const auto & file : FILES) {
            res.push_back(file.path);
        }
        return res;
    }();
    return paths;
}

void st3_serve_page(httplib::Server & server, const std::string & prefix, bool at_root) {
    for (const auto & file : FILES) {
        server.Get(prefix + file.path, [&file](const httplib::Request &, httplib::Response & res) {
            res.set_header("Content-Security-Policy", POLICY);
            res.set_header("X-Content-Type-Options", "nosniff");
            res.set_header("Referrer-Policy", "no-referrer");
            res.set_header("Cache-Control", "no-cache");
            res.set_content(file.text, file.type);
        });
    }
    if (at_root) {
        server.Get(prefix + "/", [prefix](const httplib::Request &, httplib::Response & res) {
            res.set_redirect(prefix + "/st3");
        });
    }
}

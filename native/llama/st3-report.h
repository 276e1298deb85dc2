// st3-report.h - what st3_report() says.
#pragma once

#include "llama.h"

#include <string>

// The JSON object that st3.h describes; seq_id < 0: the sequence that had the last prompt.
std::string st3_make_report(const llama_context & ctx, llama_seq_id seq_id);

// Multiplications and additions of a decoder for n_rows positions after n_before others, with nothing dropped and one output.
double st3_flops(const llama_model & model, double n_rows, double n_before);

// st3-saved.h - the parts that a saved state is made of, each as it is written and as it is read and checked.
#pragma once

#include "llama-kv-cells.h"
#include "st3-bytes.h"
#include "st3-images.h"
#include "st3-prompt.h"

#include <vector>

class st3_memory;
struct llama_model;

struct st3_saved_cell {
    llama_pos                 pos;
    llama_kv_cell_ext         ext;
    std::vector<llama_seq_id> seqs;
};

// What a state and the memory that it goes into must have in common.
void st3_put_shape(st3_writer & w, const st3_memory & mem);

void st3_put(st3_writer & w, const st3_image & image);
void st3_put(st3_writer & w, const st3_prompt & prompt);
void st3_put(st3_writer & w, const llama_kv_cells & cells, uint32_t i, const std::vector<llama_seq_id> & seqs);

// They throw where what they read cannot be.
st3_image      st3_get_image(st3_reader & r, const st3_memory & mem);
st3_prompt     st3_get_prompt(st3_reader & r, const llama_model & model);
st3_saved_cell st3_get_cell(st3_reader & r);

// Copyright (c) mmdcnv4 contributors.
// SPDX-License-Identifier: Apache-2.0
//
// attention.h — runs a call of multi-scale deformable attention on the emulator.
//
//     <file> <schedule> <alignment> <dtype> <locations are float32> <weights are float32>
//     <is deterministic> <scale> <device> <B> <Q> <M> <D> <K> <L> then height and width per level
//
// <device> is as in main.cpp; a launch takes so few images that neither blocks nor pixels times
// heads nor samples exceed its last number. <scale>: of fixed point, before the bits of the plan.
// The file holds value, locations, weights and grad_output; appended are output, grad_value (in the
// type in which it is summed, float64 if deterministic), grad_locations and grad_weights. Standard
// output gets the plans as JSON, and the reductions of the backward kernel.
#pragma once

#include <istream>

void run_attention(std::istream& line);

// Copyright (c) mmdcnv4 contributors.
// SPDX-License-Identifier: Apache-2.0
//
// kernels_generic.cpp — the CPU kernels for any processor.

#include "kernel_includes.h"

#define MMDCNV4_INSTRUCTION_SET generic
#define MMDCNV4_VECTOR_BYTES 16
#include "kernels.inl"

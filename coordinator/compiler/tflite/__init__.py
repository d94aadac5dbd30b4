# SPDX-License-Identifier: Apache-2.0
"""TFLite in and out: models imported, trained tensors written back, training graphs lowered."""

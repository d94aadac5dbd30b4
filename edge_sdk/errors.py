# SPDX-License-Identifier: Apache-2.0
"""One tree of errors. A class exists for each thing a caller can do; the message says what to do.

Every message has three parts: what was expected, what came, what to do about it.
"""

from __future__ import annotations


class FedgeError(Exception):
    """The root of every error that fedge raises on purpose."""


class ConfigError(FedgeError, ValueError):
    """A setting is wrong: correct it and start again."""


class BundleError(FedgeError, ValueError):
    """A bundle is damaged, forged or too new: fetch it again or upgrade."""


class RefusedError(BundleError):
    """A bundle is whole, and this device will not run it: the message names graph and reason."""


class CodecError(FedgeError, ValueError):
    """An update body breaks its declared bounds, or a codec chain makes no sense."""


class MessageError(FedgeError, ValueError):
    """A frame from the network is malformed, oversized or not signed by whom it claims."""


class TransportError(FedgeError, ConnectionError):
    """The broker cannot be reached or refuses us."""


class EngineError(FedgeError, RuntimeError):
    """No engine can run this bundle, or the engine failed while it did."""


class StoreError(FedgeError, OSError):
    """State on disk cannot be written, or what is there is not ours."""


class CompileError(FedgeError, ValueError):
    """The compiler cannot train this model: the message names the node and what to do."""

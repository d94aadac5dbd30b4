# SPDX-License-Identifier: Apache-2.0
"""`fedge demo`: a broker, a coordinator and real device processes learn together on one machine."""

# SPDX-License-Identifier: Apache-2.0
# UNTESTED: a recipe for OpenEmbedded (scarthgap or newer, meta-python). onnxruntime comes from a layer
# of your own, for example meta-onnxruntime; without it set RDEPENDS to an engine that you do have.
SUMMARY = "Federated learning on a small board: predicts, learns, takes part"
HOMEPAGE = "https://pypi.org/project/fedge/"
LICENSE = "Apache-2.0"
LIC_FILES_CHKSUM = "file://${COMMON_LICENSE_DIR}/Apache-2.0;md5=89aea4e17d99a7cacdbeed46a0096b10"

PYPI_PACKAGE = "fedge"
SRC_URI += "file://fedge-device.service"
# SRC_URI[sha256sum] = "of the sdist that you take"

inherit pypi python_hatchling systemd

RDEPENDS:${PN} += "\
    python3-core python3-modules python3-numpy python3-paho-mqtt python3-cryptography \
    onnxruntime-python ca-certificates \
"

# The workstation's half stays at home.
do_install:append() {
    rm -rf ${D}${PYTHON_SITEPACKAGES_DIR}/coordinator
    install -D -m 0644 ${WORKDIR}/fedge-device.service \
        ${D}${systemd_system_unitdir}/fedge-device.service
    install -d -m 0755 ${D}${sysconfdir}/fedge
}

SYSTEMD_SERVICE:${PN} = "fedge-device.service"
FILES:${PN} += "${systemd_system_unitdir}"

"""llama.cpp's log: which line is quoted."""

from st3_edge.native.log import Log

ERROR, INFO, CONTINUE = 4, 2, 5


def test_the_first_error_is_quoted_whatever_follows():
    # broken if what went wrong were forgotten for its consequences
    log = Log()
    assert log.why() == ""
    log.receive(INFO, b"loading")
    log.receive(ERROR, b"load_tensors: ")
    log.receive(CONTINUE, b"the tensor is missing\n")
    log.forget()
    for text in (b"load: the file is damaged\n", *(b"free: error %d\n" % i for i in range(20))):
        log.receive(ERROR, text)
    assert log.why() == ": the file is damaged"
    log.forget()
    assert log.why() == ""

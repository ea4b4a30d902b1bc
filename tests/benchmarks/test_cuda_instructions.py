"""Counting what nvdisasm says of a kernel."""

from benchmarks.cuda_instructions import Counts, count

# Two loops, one within another that is not counted as a loop, and the trap behind the end.
KERNEL = """
.text.a_kernel:
        /*0000*/                   LDC R1, c[0x0][0x28] ;
.L_x_0:
        /*0010*/                   S2R R66, SR_CTAID.X ;
.L_x_1:
        /*0020*/                   FADD R1, R1, R2 ;
        /*0030*/                   FMUL R1, R1, R2 ;
        /*0040*/               @P1 BRA `(.L_x_1) ;
        /*0050*/               @P2 BRA `(.L_x_0) ;
        /*0060*/               @P3 BRA `(.L_x_3) ;
.L_x_2:
        /*0070*/                   FADD R1, R1, R2 ;
        /*0080*/               @P1 BRA `(.L_x_2) ;
.L_x_3:
        /*0090*/                   EXIT ;
.L_x_4:
        /*00a0*/                   BRA `(.L_x_4);
        /*00b0*/                   NOP;
"""


def test_instructions_in_and_outside_of_innermost_loops():
    assert count(KERNEL) == Counts(outside=7, loops=[3, 2])


def test_a_kernel_without_a_loop():
    assert count(KERNEL.split(".L_x_0:")[0]) == Counts(outside=1, loops=[])

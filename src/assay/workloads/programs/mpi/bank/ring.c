#include <stdio.h>
#include <mpi.h>

/* A token goes once around, and everybody adds to it. */
int main(int argc, char **argv)
{
    int me, np, token = 0;
    MPI_Status status;

    MPI_Init(&argc, &argv);
    MPI_Comm_size(MPI_COMM_WORLD, &np);
    MPI_Comm_rank(MPI_COMM_WORLD, &me);
    if (np == 1) {
        printf("token 1\n");
        MPI_Finalize();
        return 0;
    }
    if (me == 0) {
        token = 1;
        MPI_Send(&token, 1, MPI_INT, 1, 0, MPI_COMM_WORLD);
        MPI_Recv(&token, 1, MPI_INT, np - 1, 0, MPI_COMM_WORLD, &status);
        printf("token %d\n", token);
    } else {
        MPI_Recv(&token, 1, MPI_INT, me - 1, 0, MPI_COMM_WORLD, &status);
        token += me + 1;
        MPI_Send(&token, 1, MPI_INT, (me + 1) % np, 0, MPI_COMM_WORLD);
    }
    MPI_Finalize();
    return 0;
}

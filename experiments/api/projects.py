"""Projects and their members."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from django.contrib.auth.models import User
from django.db import IntegrityError, transaction
from drf_spectacular.utils import extend_schema
from pydantic import BaseModel
from rest_framework.request import Request
from rest_framework.response import Response

from experiments import access
from experiments.api.endpoint import Endpoint, Query, items
from experiments.api.problems import FieldError, Problem
from experiments.api.shapes import MemberBody, ProjectBody
from experiments.models import Membership, Project, Role


class ProjectResource(BaseModel):
    """A project, and the role that one has in it."""

    id: int
    name: str
    role: str
    created_at: datetime


class ProjectList(BaseModel):
    """The projects one belongs to, by name."""

    items: list[ProjectResource]
    next_cursor: None


class MemberResource(BaseModel):
    """A member of a project."""

    user_id: int
    user: str
    role: str


class MemberList(BaseModel):
    """A project's members, by name."""

    items: list[MemberResource]
    next_cursor: None


def projects_of(principal: access.Principal) -> list[dict[str, Any]]:
    """The principal's projects with its role in each; a superuser administers all."""
    roles = dict(Membership.objects.filter(user=principal.user).values_list("project_id", "role"))
    every = Role.ADMIN.value if principal.user.is_superuser else ""
    return [
        ProjectResource(id=row.pk, name=row.name, role=every or roles[row.pk], created_at=row.created_at).model_dump(mode="json")
        for row in access.visible_projects(principal).order_by("name")
    ]


class Projects(Endpoint):
    """Projects."""

    @extend_schema(operation_id="list_projects", responses=ProjectList)
    def get(self, request: Request) -> Response:
        """Those one belongs to."""
        self.query(Query)
        return items(projects_of(self.principal))

    @extend_schema(operation_id="create_project", request=ProjectBody, responses={201: ProjectResource})
    def post(self, request: Request) -> Response:
        """A new project, without members."""
        name = self.body(ProjectBody).name
        try:
            with transaction.atomic():
                row = Project.objects.create(name=name)
        except IntegrityError:
            detail = f"name: there is a project {name} already"
            raise Problem("conflict", detail, [FieldError(pointer="/name", detail=detail)]) from None
        shown = ProjectResource(id=row.pk, name=row.name, role=Role.ADMIN.value, created_at=row.created_at)
        return Response(shown.model_dump(mode="json"), status=201)


class Members(Endpoint):
    """The members of a project."""

    @extend_schema(operation_id="list_members", responses=MemberList)
    def get(self, request: Request, project_id: int) -> Response:
        """Who is in, and as what."""
        self.query(Query)
        rows = Membership.objects.filter(project=project_id).select_related("user").order_by("user__username")
        return items([_shown(row) for row in rows])

    @extend_schema(operation_id="set_member", request=MemberBody, responses=MemberResource)
    def put(self, request: Request, project_id: int) -> Response:
        """Takes a user in, or changes a member's role."""
        body = self.body(MemberBody)
        user = User.objects.filter(username=body.user, is_active=True).first()
        if user is None:
            raise Problem("invalid", errors=[FieldError(pointer="/user", detail=f"user: there is no user {body.user}")])
        row, _ = Membership.objects.update_or_create(project_id=project_id, user=user, defaults={"role": body.role})
        return Response(_shown(row))


class OneMember(Endpoint):
    """A member of a project."""

    @extend_schema(operation_id="remove_member", responses={204: None})
    def delete(self, request: Request, project_id: int, user_id: int) -> Response:
        """Takes the user out; what they made stays."""
        if user_id >= 2**63 or not Membership.objects.filter(project=project_id, user=user_id).delete()[0]:
            raise Problem("not-found", f"project {project_id} has no member {user_id}")
        return Response(status=204)


def _shown(row: Membership) -> dict[str, Any]:
    return MemberResource(user_id=row.user_id, user=row.user.get_username(), role=row.role).model_dump()
